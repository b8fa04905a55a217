"""What SFTTrainer stumbles over in the rows that it is given, found out before a model is loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..errors import FNSFTError
from ..json_text import from_json


_SAMPLED = 1000  # rows at once
_TABLES = ("arrow", "pandas", "polars")  # formats of a dataset in which a row is a table
_MASKS = ("completion_mask", "assistant_masks")
_KINDS = (pa.types.is_string, pa.types.is_list)
_NO_TEXT = (pa.types.is_primitive, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null, pa.types.is_struct)


def first_row(dataset: Any, name: str) -> dict:
    """The first row of what is given as a dataset.

    Raises:
        FNSFTError: it is none, holds no row, or gives tables in place of rows.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        found = "missing" if dataset is None else f"a {type(dataset).__name__}"
        remedy = "to_trl_format makes one of a list of rows"
        if isinstance(dataset, Mapping) and dataset:
            remedy = f"give one of its entries ({', '.join(map(repr, dataset))})"
        raise FNSFTError(f"{name} is {found}; expected a Dataset or an IterableDataset of datasets ({remedy})")
    if isinstance(dataset, Dataset) and dataset.format["type"] in _TABLES:
        raise FNSFTError(
            f"{name} has the format {dataset.format['type']}, in which a row is a table; give its with_format(None)"
        )
    sample = next(iter(dataset), None)
    if sample is None:
        raise FNSFTError(f"{name} has no rows; at least one was expected")
    return sample


def check_held_out(dataset: Any) -> None:
    """Check what is given to be evaluated on, one dataset or several by name; `None` passes.

    Raises:
        FNSFTError: one of them is no dataset, or holds no row.
    """
    if isinstance(dataset, dict) and not dataset:
        raise FNSFTError("eval_dataset is an empty dict; give datasets by name, or None")
    if dataset is not None:
        for name, rows in datasets_of({"train_dataset": None, "eval_dataset": dataset}):
            if name != "train_dataset":
                first_row(rows, name)


def datasets_of(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and dataset of all rows that a trainer is given, those to train first."""
    yield "train_dataset", given["train_dataset"]
    held_out = given.get("eval_dataset")
    if isinstance(held_out, dict):
        yield from ((f"eval_dataset[{name!r}]", rows) for name, rows in held_out.items())
    elif held_out is not None:
        yield "eval_dataset", held_out


def check_cells(dataset: Dataset | IterableDataset, name: str, text_field: str) -> None:
    """Check that the columns that TRL reads hold text or messages, all of one kind, and no nulls.

    Args:
        dataset: the rows; those of a stream are not read ahead.
        name: of the rows, for messages.
        text_field: the column that is read where there are neither answers nor conversations.

    Raises:
        FNSFTError: a column, or a row, that does not.
    """
    columns = set(dataset.column_names or [])
    pair = ["prompt", "completion"]
    read = pair if columns >= {*pair} else ["messages"] if "messages" in columns else [text_field]
    if not isinstance(dataset, Dataset) or "input_ids" in columns or not columns >= {*read}:
        return
    mended = f"to_trl_format({name}) makes text of numbers, and leaves out rows that have none"
    types = {column: dataset.features.arrow_schema.field(column).type for column in read}
    for column, kind in types.items():
        if any(is_kind(kind) for is_kind in _NO_TEXT):  # the type of JSON holds anything
            raise FNSFTError(f"{column!r} of {name} is of the type {kind}; expected text or messages ({mended})")
    if len({is_kind for kind in types.values() for is_kind in _KINDS if is_kind(kind)}) > 1:
        raise FNSFTError(
            f"of {' and '.join(map(repr, read))} in {name}, one is text and the other messages; to_trl_format({name}) "
            "makes messages of both"
        )
    first = 0
    for batch in dataset.select_columns(read).with_format("arrow").iter(batch_size=_SAMPLED):
        for column in read:
            if batch[column].null_count:
                number = first + batch[column].is_null().to_pylist().index(True)
                raise FNSFTError(f"row {number} of {name} has no {column!r}; {mended}")
        first += len(batch)


def check_rows(dataset: Dataset | IterableDataset, name: str, prepares: bool, is_vision: bool) -> None:
    """Check what else SFTTrainer stumbles over in single rows.

    Args:
        dataset, name: as of [`check_cells`].
        prepares: whether SFTTrainer prepares them.
        is_vision: whether they hold images.

    Raises:
        FNSFTError: with the number of the row.
    """
    columns = set(dataset.column_names or [])
    if not prepares:
        if not is_vision and "labels" not in columns and columns & {*_MASKS}:
            raise FNSFTError(
                f"{name} has masks and no labels, which skip_prepare_dataset leaves out; add labels (-100 where "
                "nothing is learnt), or drop skip_prepare_dataset"
            )
        return
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise FNSFTError(
            f"{name} has a transform (with_transform), which SFTTrainer cannot prepare; write its results with map, "
            'or set dataset_kwargs={"skip_prepare_dataset": True} and let it give input_ids'
        )
    if (
        not isinstance(dataset, Dataset)
        or "input_ids" in columns
        or not (read := columns & {"tools", "chat_template_kwargs"})
    ):
        return
    for number, row in enumerate(dataset.select_columns(sorted(read))):
        if isinstance(row.get("tools"), str) and not _is_json(row["tools"]):
            problem = "'tools' that are no JSON"
        elif "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], Mapping):
            problem = "no 'chat_template_kwargs', which other rows have"
        else:
            continue
        raise FNSFTError(f"row {number} of {name} has {problem}; to_trl_format({name}) mends or leaves out such rows")


def check_ids(dataset: Dataset, name: str, size: int) -> None:
    """Check that token ids are those of the model: others end a training with an error of the accelerator.

    Args:
        dataset, name: as of [`check_cells`], with `input_ids`.
        size: number of tokens that the model has.

    Raises:
        FNSFTError: with the number of the row.
    """
    first = 0
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_SAMPLED):
        column = batch["input_ids"].combine_chunks()
        ids = column.flatten()
        bounds = pc.min_max(ids).as_py()
        if column.null_count or not pa.types.is_integer(ids.type):
            rows = (number for number, row in enumerate(column) if not row.is_valid)
            raise FNSFTError(f"row {first + next(rows, 0)} of {name} has no whole numbers as 'input_ids'; give some")
        if len(ids) and not 0 <= bounds["min"] <= bounds["max"] < size:
            number, odd = next((n, i) for n, row in enumerate(column.to_pylist()) for i in row if not 0 <= i < size)
            raise FNSFTError(
                f"row {first + number} of {name} has the token {odd}, and the model has {size}; tokenise the rows by "
                "the tokenizer of this model"
            )
        first += len(batch)


def _is_json(text: str) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True
