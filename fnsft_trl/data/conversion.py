"""Rows of any known format -> rows of TRL's, for a whole dataset."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ..errors import FNSFTError
from . import formats
from .formats import (
    KEPT_COLUMNS,
    MESSAGES,
    PROMPT_COMPLETION,
    TEXT,
    TOKENS,
    Match,
    UnusableRow,
    convert_row,
    find_formats,
)


logger = logging.get_logger(__name__)

_BATCH = 1000


def to_trl_format(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict | Iterable[Mapping],
    columns: str | Mapping[str, str] | None = None,
    *,
    name: str = "the dataset",
    text_field: str = "text",
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """
    Convert a dataset in any known format to one that [`~trl.SFTTrainer`] reads.

    Questions and answers, under whatever names, become TRL's conversational `prompt` and `completion`, so that the
    loss is on the completion only; `conversations` become `messages`; `text`, `messages` and `input_ids` stay as they
    are. Rows without text in a column that their format needs are left out, with a warning that counts them.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a dict of their splits, or list of `dict`):
            The rows.
        columns (`str` or `dict`, *optional*):
            Which columns to read, as `"prompt=question,completion=answer"` or the same as a dict; they are recognised
            by their names otherwise.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What messages call it.
        text_field (`str`, *optional*, defaults to `"text"`):
            The column that the trainer reads text from (`dataset_text_field`).

    Returns:
        What was given, converted; a [`~datasets.Dataset`] of a list.

    Raises:
        FNSFTError: no known format, no usable row, a cell that is no text, or rows of text beside conversations.

    Example:

    ```python
    >>> from fnsft_trl import to_trl_format

    >>> to_trl_format([{"question": "2 + 2?", "answer": 4}])[0]
    {'prompt': [{'content': '2 + 2?', 'role': 'user'}], 'completion': [{'content': '4', 'role': 'assistant'}]}
    ```
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        named = {split: f"the split {split!r} of {name}" for split in dataset}
        return type(dataset)(
            {s: to_trl_format(rows, columns, name=named[s], text_field=text_field) for s, rows in dataset.items()}
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = list(dataset)
    names = _column_names(dataset)
    if not names or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise FNSFTError(f"{name} is empty; at least one row was expected")
    matches = _formats_of(names, columns, name, text_field)
    _say_format(matches, names, name)
    if matches[0].format.becomes == TOKENS:
        tokens = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
        return tokens.select_columns(list(matches[0].names))
    kept = [column for column in KEPT_COLUMNS if column in names]
    if isinstance(dataset, IterableDataset):
        return _convert_stream(dataset, matches, kept, name)
    return (_convert_dataset if isinstance(dataset, Dataset) else _convert_list)(dataset, matches, kept, name)


def _formats_of(names: list[str], columns: str | Mapping[str, str] | None, name: str, text_field: str) -> list[Match]:
    try:
        return find_formats(names, chosen=columns, text_field=text_field)
    except FNSFTError as error:
        raise FNSFTError(f"{name} {error}" if str(error).startswith("has ") else str(error)) from error


def _convert_list(rows: list[Mapping], matches: Sequence[Match], kept: list[str], name: str) -> Dataset:
    dropped: list = []
    found = [
        {**converted, **{column: row.get(column) for column in kept}}
        for _, row, converted in _usable(enumerate(rows), matches, name, dropped)
    ]
    _warn_dropped(dropped, len(rows), name)
    kind = _common_kind(Counter(map(_kind, found)), name)
    return Dataset.from_list([_as_kind(row, kind, name) for row in found])


def _column_names(dataset) -> list[str]:
    if isinstance(dataset, list):
        return list(dict.fromkeys(column for row in dataset for column in row))
    if dataset.column_names is None:
        return list(next(iter(dataset), {}))
    return list(dataset.column_names)


def _say_format(matches: Sequence[Match], names: list[str], name: str) -> None:
    match = matches[0]
    used = set().union(*(match.used for match in matches))
    unused = [column for column in names if column not in used and column not in KEPT_COLUMNS]
    if match.format.becomes in (TEXT, MESSAGES, TOKENS) and not unused and match.system is None:
        return
    read = [match.names[column] for column in match.format.columns if match.names.get(column) in match.used]
    system = f" and {match.system} (system)" if match.system else ""
    others = [other.format.name for other in matches[1:] if not other.used <= match.used]
    rows = f"; rows in which these are empty: as {' or as '.join(others)}" if others else ""
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    logger.warning(f"{name} is read as {', '.join(read)}{system}{rows}{rest}")


def _usable(
    numbered: Iterable[tuple[int, Mapping]], matches: Sequence[Match], name: str, dropped: list[tuple[int, str]]
) -> Iterator[tuple[int, Mapping, dict]]:
    """(number, row, converted row) of the rows that can be read; the others go to `dropped`."""
    for number, row in numbered:
        try:
            yield number, row, convert_row(row, matches)
        except UnusableRow as missing:
            dropped.append((number, missing.args[0]))
        except FNSFTError as error:
            raise FNSFTError(f"{name}, row {number}: {error}") from error


def _warn_dropped(dropped: list[tuple[int, str]], rows: int, name: str) -> None:
    if not dropped:
        return
    number, column = dropped[0]
    if len(dropped) == rows:
        raise FNSFTError(f"{name} has no row to train on: {column!r} is empty or without an answer in row {number}")
    logger.warning(
        f"{name}: {len(dropped)} of {rows} rows are left out, their text is missing; the first is row {number}, where "
        f"{column!r} is empty or without an answer"
    )


def _rows(batch: Mapping[str, list]) -> Iterator[dict]:
    for cells in zip(*batch.values(), strict=True):
        yield dict(zip(batch, cells, strict=True))


def _numbered(dataset: Dataset) -> Iterator[tuple[int, dict]]:
    batches = dataset.iter(batch_size=_BATCH)
    return enumerate(row for batch in batches for row in _rows(batch))


def _convert_dataset(dataset: Dataset, matches: Sequence[Match], kept: list[str], name: str) -> Dataset:
    read = sorted(set().union(*(match.used for match in matches)))
    dropped: list = []
    usable: list[int] = []
    kinds: Counter = Counter()
    stay = True
    for number, row, converted in _usable(_numbered(dataset.select_columns(read)), matches, name, dropped):
        usable.append(number)
        kinds[_kind(converted)] += 1
        stay = stay and all(row.get(column) == value for column, value in converted.items())
    _warn_dropped(dropped, len(dataset), name)
    kind = _common_kind(kinds, name)
    if dropped:
        dataset = dataset.select(usable)
    if stay and len(kinds) == 1:
        return dataset.select_columns([*_columns(kind, matches), *kept])

    def convert(batch: dict[str, list]) -> dict[str, list]:
        rows = [_as_kind(convert_row(row, matches), kind, name) for row in _rows(batch)]
        return {column: [row[column] for row in rows] for column in _columns(kind, matches)}

    turns = _turns_of(dataset.features, read)
    types = {column: turns if kind != TEXT else Value("string") for column in _columns(kind, matches)}
    features = Features(types | {column: dataset.features[column] for column in kept})
    # Nothing of this is read from the cache of `datasets`, and what is made of the result later is not mixed up there
    # with what another version of this package made of it: the keys do not see the code behind a function's name.
    made_by = Hasher.hash([dataset._fingerprint, _code(), matches, kind])
    return dataset.map(
        convert,
        batched=True,
        batch_size=_BATCH,
        remove_columns=[column for column in dataset.column_names if column not in kept],
        features=features,
        load_from_cache_file=False,
        new_fingerprint=made_by,
        desc=f"Reading {name}",
    )


def _turns_of(features: Features, columns: Iterable[str]) -> List:
    """The type of converted messages: role, content, and whatever else the dataset's messages have."""
    turn = {"role": Value("string"), "content": Value("string")}
    for column in columns:
        messages = features[column]
        if isinstance(messages, dict):  # by columns
            fields = {name: feature.feature for name, feature in messages.items() if isinstance(feature, List)}
        elif isinstance(messages, List) and isinstance(messages.feature, dict):
            fields = messages.feature
        else:
            fields = {}
        if not fields.keys() & {"role", "from"}:
            continue
        for name, feature in fields.items():
            name = {"from": "role", "value": "content"}.get(name, name)
            if name != "role" and feature != Value("null"):
                turn[name] = feature
    return List(turn)


def _code() -> bytes:
    """The source of what converts a row."""
    return b"".join(Path(module).read_bytes() for module in (formats.__file__, __file__))


def _convert_stream(dataset: IterableDataset, matches: Sequence[Match], kept: list[str], name: str) -> IterableDataset:
    dropped: list = []
    first = next((row for _, _, row in _usable(enumerate(islice(dataset, _BATCH)), matches, name, dropped)), None)
    if first is None:
        _warn_dropped(dropped, len(dropped), name)
    kind = _kind(first)
    warned: list = []

    def convert(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        missing: list = []
        rows = [
            {**_as_kind(converted, kind, name), **{column: row.get(column) for column in kept}}
            for _, row, converted in _usable(zip(numbers, _rows(batch), strict=True), matches, name, missing)
        ]
        if missing and not warned:
            warned.append(True)
            logger.warning(f"{name}: rows without text are left out; the first is row {missing[0][0]}")
        return {column: [row[column] for row in rows] for column in (*_columns(kind, matches), *kept)}

    return dataset.map(convert, batched=True, batch_size=32, with_indices=True, remove_columns=_column_names(dataset))


def _kind(row: Mapping) -> str:
    if "prompt" in row:
        return PROMPT_COMPLETION
    return MESSAGES if "messages" in row else TEXT


def _columns(kind: str, matches: Sequence[Match]) -> list[str]:
    """The columns of a converted dataset."""
    if kind == TEXT:
        return next(list(match.format.prompt) for match in matches if match.format.becomes == TEXT)
    return ["prompt", "completion"] if kind == PROMPT_COMPLETION else ["messages"]


def _common_kind(kinds: Counter, name: str) -> str:
    """What all rows of a dataset become, given how many would become what."""
    if len(kinds) == 1:
        return next(iter(kinds))
    if set(kinds) == {PROMPT_COMPLETION, MESSAGES}:
        logger.warning(
            f"{name} has {kinds[PROMPT_COMPLETION]} rows of prompt and completion beside {kinds[MESSAGES]} "
            "conversations: all become messages, and the loss is on every turn; set assistant_only_loss to have it on "
            "the answers"
        )
        return MESSAGES
    found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    raise FNSFTError(
        f"{name} mixes rows that cannot be trained together: {found}; keep one kind, or choose its columns (columns)"
    )


def _as_kind(row: dict, kind: str, name: str) -> dict:
    if _kind(row) == kind:
        return row
    if kind == MESSAGES and "prompt" in row:
        rest = {column: value for column, value in row.items() if column not in ("prompt", "completion")}
        return {"messages": row["prompt"] + row["completion"], **rest}
    raise FNSFTError(f"{name} has rows that become {_kind(row)} after rows that become {kind}; keep one kind")
