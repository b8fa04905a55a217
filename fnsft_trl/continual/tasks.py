"""Task: the rows of a task as they are trained and scored, read and checked before any model is loaded."""

import difflib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import ClassLabel, Dataset

from ..data.embedded import embedded_task
from ..data.sources import load_data
from ..errors import FNSFTError
from ..writing import write_text_whole
from .task_config import TaskConfig


_EMBEDDED = "embedded:"
_SEED = 0  # of the rows that are drawn, which are the same for all arms, orders and seeds


@dataclass(frozen=True)
class Task:
    """One task with its rows.

    Attributes:
        name (`str`): of the task.
        config ([`TaskConfig`]): what it was made by.
        train (`list[dict[str, str]]`): rows to train, `prompt` and `completion`.
        test (`list[dict[str, str]]`): rows to score.
        answers (`tuple[str, ...]`): all answers that can be, where there are labels; else empty.
    """

    name: str
    config: TaskConfig
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    answers: tuple[str, ...]

    @classmethod
    def read(cls, name: str, config: TaskConfig) -> "Task":
        """Read the rows of a task.

        Args:
            name: of the task.
            config: what it is made by.

        Raises:
            FNSFTError: a dataset that cannot be read, a column or a split that it does not have, a label that the map
                does not name, or no row.
        """
        try:
            train, test = _splits(config)
            labels = config.labels or _names(train, config)
            if config.scorer == "choice" and labels is None:
                raise FNSFTError(
                    f"scorer is choice, and {config.dataset} does not name the labels in {config.answer}; give labels"
                )
            draw = random.Random(_SEED)
            trained, scored = _drawn(train, test, config, draw)
            rows = [list(_rows(part, config, labels)) for part in (trained, scored)]
        except FNSFTError as error:
            raise FNSFTError(f"task {name}: {error}") from error
        return cls(name, config, *rows, tuple(dict.fromkeys((labels or {}).values())))

    def choices(self, row: Mapping[str, str]) -> list[str]:
        """All completions that a row can have."""
        return [_completion(answer, row["prompt"]) for answer in self.answers]

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write the rows into a folder, unless they are there already; gives the files."""
        found = []
        for split, rows in (("train", self.train), ("test", self.test)):
            path = directory / f"{self.name}-{split}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text_whole(path, text)
            found.append(path)
        return found[0], found[1]


def _splits(config: TaskConfig) -> tuple[Dataset, Dataset]:
    """The rows to train and those to score, with the columns checked."""
    if config.dataset.startswith(_EMBEDDED):
        train, test = map(Dataset.from_list, embedded_task(config.dataset.removeprefix(_EMBEDDED)))
    else:
        train = _split(config, config.train_split, config.data_files)
        is_same = config.train_split == config.test_split and config.test_data_files is None
        test = train if is_same else _split(config, config.test_split, config.test_data_files or config.data_files)
    files = (config.data_files, config.test_data_files or config.data_files)
    for part, name in zip((train, test), files, strict=True):
        for column in config.columns:
            if column not in part.column_names:
                near = difflib.get_close_matches(column, part.column_names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise FNSFTError(
                    f"{name or config.dataset} has no column {column!r} (it has {', '.join(part.column_names)}){hint}"
                )
    return train, test


def _split(config: TaskConfig, split: str, files: str | None) -> Dataset:
    loaded = load_data(config.dataset, config_name=config.dataset_config, data_files=files)
    if split not in loaded:
        raise FNSFTError(f"{config.dataset} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _names(rows: Dataset, config: TaskConfig) -> dict[str, str] | None:
    """The labels that a dataset names itself."""
    if not config.has_plain_answer:
        return None
    feature = rows.features[config.answer[1:-1]]
    return {str(value): name for value, name in enumerate(feature.names)} if isinstance(feature, ClassLabel) else None


def _drawn(train: Dataset, test: Dataset, config: TaskConfig, draw: random.Random) -> tuple[Dataset, Dataset]:
    """So many rows of each, none of them in both."""
    order = draw.sample(range(len(train)), len(train))
    if test is train:
        count = min(config.test_rows, len(train) // 2)
        scored, order = order[:count], order[count:]
    else:
        scored = draw.sample(range(len(test)), min(config.test_rows, len(test)))
    trained = order[: config.train_rows]
    if not trained or not scored:
        raise FNSFTError(f"{config.dataset} has {len(train)} rows to train and {len(test)} to score; it needs both")
    # As they are drawn: of rows that are sorted by their label, the first ones must not have one label alone.
    return train.select(trained), test.select(sorted(scored))


def _rows(part: Dataset, config: TaskConfig, labels: Mapping[str, str] | None) -> Iterator[dict[str, str]]:
    for number, row in enumerate(part.select_columns(config.columns)):
        if labels is None:
            answer = _filled(config.answer, row, None)
        else:
            value = str(row[config.answer[1:-1]])
            if value not in labels:
                raise FNSFTError(
                    f"row {number} is labelled {value!r}, which labels does not name (it has {', '.join(labels)})"
                )
            answer = labels[value]
        if not answer.strip():
            raise FNSFTError(f"row {number} has an empty answer; leave such rows out of the data")
        prompt = _filled(config.prompt, row, config.max_characters)
        yield {"prompt": prompt, "completion": _completion(answer, prompt)}


def _filled(template: str, row: Mapping[str, Any], longest: int | None) -> str:
    """A template with the values of a row, each cut; for one that is missing, nothing."""
    texts = {name: "" if value is None else str(value)[:longest] for name, value in row.items()}
    return "".join(text + (texts[column] if column else "") for text, column, _, _ in Formatter().parse(template))


def _completion(answer: str, prompt: str) -> str:
    """An answer as it follows its prompt: after a space, unless there is one."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"
