"""from_json: JSON that others have written, of which nothing but a ValueError comes; and what its values come to."""

import json
from typing import Any


# What comes out of values that are others than they were written, where they are used.
WRONG_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def from_json(text: str | bytes, **options: Any) -> Any:
    """
    Read JSON.

    Args:
        text (`str` or `bytes`): in UTF-8 where it is bytes.
        options: as `json.loads` takes them.

    Raises:
        ValueError: it is none, or is nested more deeply than Python's reader goes (about a thousand levels).
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
