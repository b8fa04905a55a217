"""from_json: JSON that others have written, of which nothing but a ValueError comes; and what its values come to."""

import json
import re
from typing import Any


# What comes out of values that are others than they were written, where they are used.
WRONG_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_MAY_BE_LARGE = re.compile(r"\d[eE]\+?\d{3}|\d{309}")  # what a number that is no finite float looks like


def from_json(text: str | bytes, **options: Any) -> Any:
    """
    Read JSON.

    Args:
        text (`str` or `bytes`): in UTF-8 where it is bytes.
        options: as `json.loads` takes them.

    Raises:
        ValueError: it is none, is nested more deeply than Python's reader goes (about a thousand levels), or holds a
            number beyond those of float64.
    """
    if _MAY_BE_LARGE.search(text if isinstance(text, str) else text.decode("latin-1")):
        options = {"parse_float": _finite, **options}
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(number: str) -> float:
    value = float(number)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {number[:20]} is too large")
    return value
