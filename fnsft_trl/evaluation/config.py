"""RetentionConfig: which general texts a run is measured on, and how much of them it may lose. Free of torch."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import PurePath

from ..errors import FNSFTError
from ..fields import check_fields, documented, option


TASK = "task"  # the series of the prompts that are trained on
MEASURES = ("rise", "cross_entropy", "kl")
PREFIX = "retention/"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def metric_name(series: str, measure: str) -> str:
    """The name of a value in the log; that of a series without a name has two parts."""
    return f"{PREFIX}{series}/{measure}" if series else f"{PREFIX}{measure}"


@documented
@dataclass
class RetentionConfig:
    """
    How much of what a model knew is left: measured on general texts while it trains, and kept within a budget.

    Raises:
        FNSFTError: a value is not understood, a name stands twice, or a budget has nothing to be measured on.
    """

    retention_datasets: list[str] | None = option(
        None,
        "General texts, disjoint from the training data, each as `name=source` and a series of its own. A source is "
        "a Hub id, a directory, a file (.json, .jsonl, .csv, .parquet, .txt) or `embedded` (English Wikipedia). "
        "Without a name, the source gives it one.",
    )
    retention_tokens: int = option(
        8192, "Number of tokens to score of each text, and of the task's prompts.", least=1, most=10**8
    )
    retention_batch_size: int = option(
        8, "Sequences of up to 256 tokens in a forward pass, fewer if they are longer.", least=1
    )
    retention_budget: float | None = option(
        None,
        "Largest rise of cross-entropy, in nats per token, that any text may show. By default there is no budget.",
        least=0,
    )
    retention_on_budget: str | None = option(
        None,
        "What to do when a text passes the budget. `rollback` (the default) ends the training and goes back to the "
        "last state within the budget. `stop` ends it. `warn` says so and goes on.",
        choices=("rollback", "stop", "warn"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.retention_datasets is None:
            given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            lacking = given[0] if given else "a RetentionConfig"
            raise FNSFTError(
                f"{lacking} has no effect without retention_datasets, the texts to measure on; give some, as "
                "name=source"
            )
        if self.retention_on_budget is not None and self.retention_budget is None:
            raise FNSFTError(
                f"retention_on_budget={self.retention_on_budget} has no effect without retention_budget; give a "
                "number of nats, or drop it"
            )
        self.sources()

    def sources(self) -> dict[str, str]:
        """Name of a series -> its source.

        Raises:
            FNSFTError: a name that stands twice, is reserved, or cannot be found.
        """
        found = named_sources("retention_datasets", self.retention_datasets or ())
        if TASK in found:
            raise FNSFTError(
                f"retention_datasets holds {TASK}={found[TASK]}, but {TASK} is the series of the prompts that are "
                "trained on; give another name"
            )
        return found

    def metrics(self) -> list[str]:
        """The names of the values that a run with this config logs at each evaluation."""
        names = [metric_name(name, measure) for name in self.sources() for measure in MEASURES]
        return [*names, metric_name(TASK, "kl")]


def named_sources(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Name -> source of texts that are given as `name=source`, or as a source that gives itself a name.

    Args:
        option: that they are given as, for messages.
        texts: as they are given.

    Raises:
        FNSFTError: a name that stands twice, or cannot be found.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, source = _named(option, text)
        if name in found:
            raise FNSFTError(
                f"{option} names {name!r} twice ({found[name]} and {source}); give each text a name of its own, as "
                "name=source"
            )
        found[name] = source
    return found


def _named(option: str, text: str) -> tuple[str, str]:
    """The name and the source of what was given."""
    name, separator, source = text.partition("=")
    if separator and _NAME.fullmatch(name):
        if not source.strip():
            raise FNSFTError(f"{option} holds {text!r}, which names no source; write name=source")
        return name, source.strip()
    if separator and not name.strip():
        raise FNSFTError(f"{option} holds {text!r}, which has no name; write name=source")
    source = text.strip()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(os.path.expanduser(source)).stem).strip("-._")
    if not _NAME.fullmatch(name):
        raise FNSFTError(
            f"{option} holds {text!r}, which no name can be made of; write name=source, the name of letters, digits, "
            "_, - and ."
        )
    return name, source
