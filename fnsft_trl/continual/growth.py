"""GrowingDirections: after each stage, the directions of its task are added to those that are protected.

U are the orthonormal directions that a stage protected. V are the leading ones of its task's inputs in the model that
it trained. The next stage protects the span of both, as in Gradient Projection Memory (Saha et al., 2021, arXiv
2103.09762, section 5). Each input gets as many new directions as hold, with the old ones, a share of the task's
energy, or a given number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from ..discovery.directions import LEADING, KeptDirections, KeptText, orthonormal
from ..discovery.saved_directions import save_directions
from ..errors import FNSFTError
from ..training.protected_bases import MOST_LEADING
from ..training.protection_config import DIMS, default_leading
from .stages import GROWN_DIR


logger = logging.get_logger(__name__)

_SCARCE = 10  # a run says so where less than one in so many directions is free


@dataclass(frozen=True)
class GrowingDirections:
    """The directions that are protected after a stage.

    Attributes:
        kept ([`KeptDirections`]): of each input: those of the stage, then what its task adds.
        added (`int`): the most that the task has added to an input.
    """

    kept: KeptDirections
    added: int

    @classmethod
    def after(
        cls,
        protected: KeptDirections,
        model: nn.Module,
        text: KeptText,
        *,
        dims: float | None = None,
        title: str | None = "directions of the task",
    ) -> "GrowingDirections":
        """Add those of a finished task.

        Args:
            protected: what the stage has protected.
            model: that it has trained, with its adapter on.
            text: what it was trained on.
            dims: as `protect_dims`: how many leading directions are added to each input at most, or the share of the
                task's energy that all together are to hold.
            title: of the progress bars; `None` for none.

        Raises:
            FNSFTError: no direction of any input is left.
        """
        is_share = dims is not None and dims < 1
        leading = MOST_LEADING if is_share else int(dims or DIMS)
        modules = [name for each in protected.inputs for name in each.modules]
        found = KeptDirections.find(model, modules, {"task": text}, leading=leading, title=title)
        inputs = []
        for each in protected.inputs:
            basis = found.of(each.modules[0]).basis
            if dims is None:
                basis = basis[:, : LEADING + default_leading(each.width)]
            inputs.append(replace(each, basis=orthonormal(each.basis, basis)))
        kept = KeptDirections(tuple(inputs))
        before = [each.basis.shape[1] for each in protected.inputs]
        if is_share:
            curves = kept.energies(model, text, title=title)
            enough = [int((curve < dims).sum()) + 1 for curve in curves]
            kept = kept.first([max(had, count) for had, count in zip(before, enough, strict=True)])
        now = [each.basis.shape[1] for each in kept.inputs]
        if all(count == each.width for count, each in zip(now, kept.inputs, strict=True)):
            raise FNSFTError(
                "all directions of all inputs are protected after this stage, and a later one could learn nothing; "
                "protect fewer of each task (protect_dims), or fewer inputs"
            )
        return cls(kept, max(a - b for a, b in zip(now, before, strict=True)))

    def save(self, directory: Path) -> None:
        """Write them into the folder of a stage, for the next one."""
        save_directions(self.kept, directory / GROWN_DIR, {"what": "directions of all stages so far"})

    def free(self) -> dict[str, Any]:
        """How many directions are left that may still change, as JSON values: see [`free_directions`]."""
        return free_directions(self.kept) | {"added": self.added}


def free_directions(kept: KeptDirections) -> dict[str, Any]:
    """How many directions of the inputs are not protected.

    Returns:
        `fewest`: of the input that has the smallest share of them left, `of` so many; `share`; `module`: the first
        that reads it; `scarce`: at how many of the `inputs` less than a tenth is left.
    """
    free = [(each.width - each.basis.shape[1], each.width, each.modules[0]) for each in kept.inputs]
    fewest, width, module = min(free, key=lambda each: each[0] / each[1])
    return {
        "fewest": fewest,
        "of": width,
        "share": fewest / width,
        "module": module,
        "scarce": sum(_SCARCE * left < of for left, of, _ in free),
        "inputs": len(free),
    }


def say_free(free: Mapping[str, Any]) -> None:
    """Log how many directions are left, and warn where that is less than a tenth."""
    left = f"{free['fewest']} of {free['of']} directions ({free['share']:.0%})"
    logger.warning(f"protection grows: {left} are free for later stages at the input of {free['module']}, the fewest")
    if free["scarce"]:
        logger.warning(
            f"under a tenth of the directions are free at {free['scarce']} of {free['inputs']} inputs: later stages "
            "can hardly learn there; protect fewer of each task (protect_dims)"
        )


def text_of(rows: Iterable[Mapping[str, Any]], tokens: int) -> KeptText:
    """The first tokens of rows as they are trained.

    Args:
        rows: with `input_ids`.
        tokens: how many, but for the first of each row.
    """
    sequences, found = [], 0
    for row in rows:
        ids = list(row["input_ids"])[: tokens - found + 1]
        if len(ids) > 1:
            sequences.append(ids)
            found += len(ids) - 1
        if found >= tokens:
            break
    return KeptText(sequences)
