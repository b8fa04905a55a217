"""load_lines: a large file of JSON lines as a dataset, with memory for a few thousand rows at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features

from ..errors import FNSFTError
from ..json_text import from_json
from .left_out import LeftOut


LONG = 256 << 20  # bytes; `datasets` reads a smaller file in one piece, which takes several times its size in memory
_ROWS = 1000


def is_long(path: Path) -> bool:
    """Whether a file is one of JSON lines that is too large for one piece; a JSON array has no lines to read by."""
    if path.suffix not in (".json", ".jsonl") or path.stat().st_size <= LONG:
        return False
    with path.open(encoding="utf-8-sig") as lines:
        return next(filter(None, map(str.strip, lines)), "[")[0] != "["


def json_lines(path: Path) -> Iterator[dict]:
    """The rows of a file of JSON lines.

    Raises:
        FNSFTError: a line is no JSON object.
    """
    with path.open(encoding="utf-8-sig") as lines:  # never splitlines: U+2028 stands unescaped in texts
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = from_json(line)
            except ValueError as error:
                raise FNSFTError(f"line {number} of {path} is no JSON: {error}; expected one object a line") from error
            if not isinstance(row, dict):
                raise FNSFTError(f"line {number} of {path} is {type(row).__name__}; expected one object a line")
            yield row


def load_lines(path: Path, cache: str) -> Dataset:
    """
    Read a file of JSON lines twice: for its columns, and for its rows.

    Args:
        path (`Path`): the file.
        cache (`str`): a directory in which the dataset is kept, that belongs to the content of the file.

    Returns:
        `Dataset`: its rows. Those with half a surrogate pair, which no table can hold, are left out and counted. A
            column that begins further down is one of all rows, and a text that looks like a date stays as it is.

    Raises:
        FNSFTError: a line is no JSON object, a column is not of one type, or no row is usable.
    """
    schema, left_out, count, rows = None, LeftOut(str(path), "read"), 0, []
    for count, row in enumerate(json_lines(path), 1):
        if is_encodable(row):
            rows.append(row)
        else:
            left_out.add(count - 1, "a text holds half a surrogate pair")
        if len(rows) == _ROWS:
            schema, rows = _with_columns(schema, rows, path), []
    left_out.check(count)
    features = Features.from_arrow_schema(_with_columns(schema, rows, path))
    return Dataset.from_generator(_usable, features=features, gen_kwargs={"path": path}, cache_dir=cache)


def is_encodable(row: dict) -> bool:
    """Whether all texts of a row are text."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _usable(path: Path) -> Iterator[dict]:
    return filter(is_encodable, json_lines(path))


def _with_columns(schema: pa.Schema | None, rows: list[dict], path: Path) -> pa.Schema:
    """The columns of rows read before, with those of more rows."""
    try:
        found = pa.schema(list(pa.array(rows, type=None).type)) if rows else pa.schema([])
        return found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise FNSFTError(f"the columns of {path} are not of one type in all rows: {reason}") from error
