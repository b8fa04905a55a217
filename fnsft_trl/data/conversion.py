"""Rows of any known format -> rows of TRL's, for a whole dataset."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    Value,
    concatenate_datasets,
)
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ..compat.datasets import fingerprint
from ..errors import FNSFTError
from . import cells, formats, messages, rendering, turns
from .cells import UnusableRow, check_texts
from .formats import KEPT_COLUMNS, MESSAGES, PROMPT_COMPLETION, TEXT, TOKENS, Match, convert_row, find_formats
from .left_out import LeftOut
from .messages import PLAIN, Dialect, unread_keys


logger = logging.get_logger(__name__)

# The types of what is converted. Of structs each would have the keys of all others, as nulls.
TYPES = {
    "prompt": List(Json()),
    "completion": List(Json()),
    "messages": List(Json()),
    "tools": Value("string"),
    "chat_template_kwargs": Json(),
}

_BATCH = 1000
_GIVEN = {"tools": rendering.tools_of, "chat_template_kwargs": rendering.kwargs_of}  # to the chat template


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
    loss is on the completion only. `conversations` become `messages`. `text` and `input_ids` stay as they are, and so
    do `messages` of text. Rows that cannot be used are left out, with a warning that counts them and says why.

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
        FNSFTError: no known format, no usable row, or rows of text beside conversations or beside what looks
            like their answer.

    Example:

    ```python
    >>> from fnsft_trl import to_trl_format

    >>> to_trl_format([{"question": "2 + 2?", "answer": 4}])[0]
    {'prompt': [{'role': 'user', 'content': '2 + 2?'}], 'completion': [{'role': 'assistant', 'content': '4'}]}
    ```
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        converted = {
            split: convert(rows, columns, name=f"the split {split!r} of {name}", text_field=text_field)
            for split, rows in dataset.items()
        }
        return type(dataset)(converted)
    return convert(dataset, columns, name=name, text_field=text_field)


def convert(
    dataset: Dataset | IterableDataset | Iterable[Mapping],
    columns: str | Mapping[str, str] | None = None,
    *,
    name: str,
    text_field: str = "text",
    dialect: Dialect = PLAIN,
) -> Dataset | IterableDataset:
    """The same for one dataset, whose messages will be rendered by a chat template that reads this of them."""
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = _listed(dataset, name)
    names = _column_names(dataset)
    if not names or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise FNSFTError(f"{name} is empty; at least one row was expected")
    matches = _formats_of(names, columns, name, text_field)
    _say_format(matches, names, name)
    if matches[0].format.becomes == TOKENS:
        tokens = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
        return tokens.select_columns(list(matches[0].names))
    reader = _Reader(matches, [column for column in KEPT_COLUMNS if column in names], name, dialect)
    if isinstance(dataset, IterableDataset):
        return _convert_stream(dataset, reader)
    return (_convert_dataset if isinstance(dataset, Dataset) else _convert_list)(dataset, reader)


def _listed(rows, name: str) -> list[Mapping]:
    """Rows that are no dataset, in a list."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        remedy = "; Dataset.from_dict makes one of columns, DatasetDict of splits" if isinstance(rows, Mapping) else ""
        remedy = "; load_dataset reads a file" if isinstance(rows, str) else remedy
        raise FNSFTError(f"{name} is a {type(rows).__name__}; expected a Dataset or a list of rows{remedy}")
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise FNSFTError(f"row {number} of {name} is a {type(row).__name__}; expected a dict of its columns")
        if odd := [column for column in row if not isinstance(column, str)]:
            raise FNSFTError(f"row {number} of {name} has a column called {odd[0]!r}; expected text")
    return rows


def _formats_of(names: list[str], columns: str | Mapping[str, str] | None, name: str, text_field: str) -> list[Match]:
    try:
        return find_formats(names, chosen=columns, text_field=text_field)
    except FNSFTError as error:
        raise FNSFTError(f"{name} {error}" if str(error).startswith("has ") else str(error)) from error


class _Reader:
    """Reads rows in their formats, and notes which cannot be read and what of them is not used."""

    def __init__(self, matches: Sequence[Match], kept: Sequence[str], name: str, dialect: Dialect) -> None:
        self.matches, self.name = matches, name
        self.kept = [column for column in kept if column in _GIVEN]
        self.images = [column for column in kept if column not in _GIVEN]
        self.dialect = replace(dialect, keeps_parts=bool(self.images))
        self.columns = sorted(set().union(*(match.used for match in matches)))
        self.conversations = {name for m in matches if m.format.becomes == MESSAGES for name in m.names.values()}
        self.left_out = LeftOut(name)
        self.unread: set[str] = set()

    def read(self, row: Mapping) -> dict:
        """A row as TRL reads it, without images."""
        converted = convert_row(row, self.matches, self.dialect)
        converted |= {column: _GIVEN[column](row.get(column)) for column in self.kept}
        for column, value in converted.items():
            check_texts(value, repr(column))
        return converted

    def usable(self, numbered: Iterable[tuple[int, Mapping]], leave_out: Callable[[int, object], None]) -> Iterator:
        """(number, row, converted row) of the rows that can be read."""
        for number, row in numbered:
            for column in self.columns:
                cell = row.get(column)
                if isinstance(cell, list | Mapping) or (cell is not None and column in self.conversations):
                    self.unread |= unread_keys(cell, self.dialect)
            try:
                yield number, row, self.read(row)
            except UnusableRow as reason:
                leave_out(number, reason)

    def say_unread(self) -> None:
        """Say what messages hold that goes no further."""
        if self.unread:
            logger.warning(f"{self.name}: keys of its messages that are not used: {', '.join(sorted(self.unread))}")

    def features(self, kind: str) -> Features:
        """The types of converted rows: messages each with the keys that they have, and no null for those of others."""
        columns = [*_columns(kind, self.matches), *self.kept]
        return Features({column: TYPES.get(column, Value("string")) for column in columns})


def _convert_list(rows: list[Mapping], reader: _Reader) -> Dataset:
    usable = list(reader.usable(enumerate(rows), reader.left_out.add))
    reader.left_out.check(len(rows))
    reader.say_unread()
    kind = _common_kind(Counter(_kind(row) for _, _, row in usable), reader.name)
    converted = [_as_kind(row, kind, reader.name) for _, _, row in usable]
    data = Dataset.from_list(converted, features=reader.features(kind))
    if reader.images:
        images = [{column: row.get(column) for column in reader.images} for _, row, _ in usable]
        data = concatenate_datasets([data, Dataset.from_list(images)], axis=1)
    return data


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
    longer = any(other.format.becomes == MESSAGES and not other.used <= match.used for other in matches[1:])
    where = "in which these are empty" + (" or a conversation goes further" if longer else "")
    rows = f"; rows {where}: as {' or as '.join(others)}" if others else ""
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    logger.warning(f"{name} is read as {', '.join(read)}{system}{rows}{rest}")


def _rows(batch: Mapping[str, list]) -> Iterator[dict]:
    for row in zip(*batch.values(), strict=True):
        yield dict(zip(batch, row, strict=True))


def _numbered(dataset: Dataset) -> Iterator[tuple[int, dict]]:
    batches = dataset.iter(batch_size=_BATCH)
    return enumerate(row for batch in batches for row in _rows(batch))


def _convert_dataset(dataset: Dataset, reader: _Reader) -> Dataset:
    usable: list[int] = []
    kinds: Counter = Counter()
    stay = True
    numbered = _numbered(dataset.select_columns([*reader.columns, *reader.kept]))
    for number, row, converted in reader.usable(numbered, reader.left_out.add):
        usable.append(number)
        kinds[_kind(converted)] += 1
        stay = stay and all(row.get(column) == value for column, value in converted.items())
    reader.left_out.check(len(dataset))
    reader.say_unread()
    kind = _common_kind(kinds, reader.name)
    if reader.left_out.count:
        dataset = dataset.select(usable)
    columns = [*_columns(kind, reader.matches), *reader.kept]
    if stay and len(kinds) == 1:
        return dataset.select_columns([*columns, *reader.images])

    def convert(batch: dict[str, list]) -> dict[str, list]:
        rows = [_as_kind(reader.read(row), kind, reader.name) for row in _rows(batch)]
        return {column: [row[column] for row in rows] for column in columns}

    # Nothing of this is read from the cache of `datasets`, and what is made of the result later is not mixed up there
    # with what another version of this package made of it: the keys do not see the code behind a function's name.
    made_by = Hasher.hash([fingerprint(dataset), _code(), reader.matches, reader.dialect, kind])
    return dataset.map(
        convert,
        batched=True,
        batch_size=_BATCH,
        remove_columns=[column for column in dataset.column_names if column not in reader.images],
        features=Features(reader.features(kind) | {column: dataset.features[column] for column in reader.images}),
        load_from_cache_file=False,
        new_fingerprint=made_by,
        desc=f"Reading {reader.name}",
    )


def _code() -> bytes:
    """The source of what converts a row."""
    sources = (__file__, *(module.__file__ for module in (cells, formats, messages, rendering, turns)))
    return b"".join(Path(source).read_bytes() for source in sources)


def _convert_stream(dataset: IterableDataset, reader: _Reader) -> IterableDataset:
    first = next((row for _, _, row in reader.usable(enumerate(islice(dataset, _BATCH)), reader.left_out.add)), None)
    if first is None:
        reader.left_out.check(reader.left_out.count)
    reader.say_unread()
    kind = _kind(first)
    met = LeftOut(reader.name)

    def convert(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        numbered = zip(numbers, _rows(batch), strict=True)
        rows = [
            {**_as_kind(converted, kind, reader.name), **{column: row.get(column) for column in reader.images}}
            for _, row, converted in reader.usable(numbered, met.add_and_say)
        ]
        columns = (*_columns(kind, reader.matches), *reader.kept, *reader.images)
        return {column: [row[column] for row in rows] for column in columns}

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
