"""Several converted datasets -> one."""

from datasets import Dataset, Features, concatenate_datasets
from transformers.utils import logging

from ..errors import FNSFTError
from .conversion import TYPES


logger = logging.get_logger(__name__)

_NOTHING = {"tools": None, "chat_template_kwargs": {}}  # of a row that has none, where others do


def put_together(parts: list[Dataset]) -> Dataset:
    """One dataset of several; conversations beside prompts and completions make all of them conversations.

    Raises:
        FNSFTError: their rows become different things.
    """
    if len(parts) == 1:
        return parts[0]
    if any("messages" in rows.column_names for rows in parts) and any(map(is_prompted, parts)):
        logger.warning(
            "conversations are trained together with prompts and completions: all become messages, and the loss is on "
            "every turn; set assistant_only_loss to have it on the answers"
        )
        parts = [_as_conversations(rows) if is_prompted(rows) else rows for rows in parts]
    parts = _alike(parts)
    if len({tuple(sorted(rows.column_names)) for rows in parts}) > 1:
        found = "; ".join(", ".join(rows.column_names) for rows in parts)
        raise FNSFTError(
            f"the datasets cannot be trained together, for their rows become different things ({found}); give one kind"
        )
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise FNSFTError(f"the datasets cannot be put together: {error}") from error


def is_prompted(rows: Dataset) -> bool:
    """Whether rows are prompts with completions."""
    return "prompt" in rows.column_names


def _as_conversations(rows: Dataset) -> Dataset:
    features = {name: feature for name, feature in rows.features.items() if name not in ("prompt", "completion")}
    return rows.map(
        lambda row: {"messages": row["prompt"] + row["completion"]},
        remove_columns=["prompt", "completion"],
        features=Features(features | {"messages": TYPES["messages"]}),
    )


def _alike(parts: list[Dataset]) -> list[Dataset]:
    """The same with what chat templates are given in all of them, and with one type for each column."""
    given = [name for name in _NOTHING if any(name in rows.column_names for rows in parts)]
    parts = [_with_columns(rows, given) for rows in parts]
    for name in TYPES:
        types = [rows.features[name] for rows in parts if name in rows.column_names]
        if any(kind != types[0] for kind in types):
            parts = [rows.cast_column(name, TYPES[name]) if name in rows.column_names else rows for rows in parts]
    return parts


def _with_columns(rows: Dataset, names: list[str]) -> Dataset:
    """Rows with these of [`_NOTHING`], where they have none of their own."""
    for name in names:
        if name not in rows.column_names:
            nothing = {name: [_NOTHING[name]] * len(rows)}
            rows = concatenate_datasets(
                [rows, Dataset.from_dict(nothing, features=Features({name: TYPES[name]}))], axis=1
            )
    return rows
