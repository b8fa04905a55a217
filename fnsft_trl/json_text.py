"""from_json: JSON that others have written, of which nothing but a ValueError comes."""

import json
from typing import Any


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
