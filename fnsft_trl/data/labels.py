"""Rows that teach nothing: of none of their tokens a model learns that it comes next."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl import SFTConfig

from ..errors import FNSFTError


logger = logging.get_logger(__name__)

_ROWS = 1000  # read at a time; and of a stream, at most until one teaches something
_IGNORED = -100  # the label of a token that is not learnt
_CUTTING = "bfd"  # the packing that cuts rows at max_length, and keeps them apart


def check_labels(prepared: Dataset, rows: int, name: str, *, max_length: int | None, packing: str | None) -> None:
    """Say how many rows of prepared data teach nothing, whether they are still there or were left out.

    Args:
        prepared: what SFTTrainer made of the rows, packed or not.
        rows: the number of rows that it was made from.
        name: of the split.
        max_length: where rows are cut.
        packing: the strategy of packing, if they are packed.

    Raises:
        FNSFTError: all of them.
    """
    there = taught = 0
    for batch in _taught(prepared):
        there, taught = there + len(batch), taught + int(batch.sum())
    begins = f"begins after max_length={max_length} tokens"
    if there == 0 and packing is None:
        raise FNSFTError(f"the answer of every row of the {name} data {begins}; set a larger max_length")
    if taught == 0:
        raise FNSFTError(_nothing(name, max_length))
    nothing = there - taught
    if packing is None and there < rows:
        logger.warning(f"{rows - there} of {rows} rows of the {name} data are left out: their answer {begins}")
    if packing is not None:
        nothing = rows - taught if packing == _CUTTING else 0  # other strategies cut none, and join them
    if nothing:
        logger.warning(
            f"{nothing} of {rows} rows of the {name} data teach nothing: they do not have {_needed(max_length)}"
        )


def watch_labels(stream: IterableDataset, name: str, args: SFTConfig, packing: str | None) -> IterableDataset:
    """A stream of rows with labels, before they are cut, that says so when one passes that will teach nothing.

    Raises:
        FNSFTError: neither of the first rows does.
    """
    if args.max_length is None or packing not in (None, _CUTTING):
        kept = slice(None)
    elif args.truncation_mode == "keep_end" and packing is None:
        kept = slice(-args.max_length, None)
    else:
        kept = slice(None, args.max_length)

    def teaches(row: dict) -> bool:
        return any(label != _IGNORED for label in row["labels"][kept][1:])

    if not any(teaches(row) for row in islice(stream, _ROWS)):
        raise FNSFTError(_nothing(name, args.max_length, f" (of the first {_ROWS})"))
    said: list[int] = []

    def noted(row: dict, number: int) -> dict:
        if not said and not teaches(row):
            said.append(number)
            logger.warning(
                f"rows of the {name} data teach nothing, which do not have {_needed(args.max_length)}; the first is "
                f"row {number}"
            )
        return row

    return stream.map(noted, with_indices=True)


def _nothing(name: str, max_length: int | None, which: str = "") -> str:
    longer = "" if max_length is None else ", or set a larger max_length"
    return (
        f"no row of the {name} data{which} teaches anything: none has {_needed(max_length)}; give rows of more than "
        f"one token whose answer is not empty{longer}"
    )


def _needed(max_length: int | None) -> str:
    within = "" if max_length is None else f" within max_length={max_length} tokens"
    return f"a token with a label after their first{within}"


def _taught(prepared: Dataset) -> Iterator[np.ndarray]:
    """Of each row, or of each that is packed into one, whether it teaches something; shape (rows of a batch,)."""
    names = [name for name in ("labels", "seq_lengths") if name in prepared.column_names]
    for table in prepared.select_columns(names).with_format("arrow").iter(batch_size=_ROWS):
        labels = _flat(table, "labels")
        if "seq_lengths" in names:
            lengths = _flat(table, "seq_lengths")
        else:
            lengths = pc.list_value_length(table.column("labels")).to_numpy()
        ends = np.cumsum(lengths)
        starts = ends - lengths
        learnt = np.append(labels != _IGNORED, False)  # so that an empty row at the end begins somewhere
        learnt[starts[lengths > 0]] = False  # nothing comes before it
        before = np.concatenate([[0], np.cumsum(learnt)])
        yield before[ends] > before[starts]


def _flat(table: pa.Table, name: str) -> np.ndarray:
    return pc.list_flatten(table.column(name)).to_numpy()
