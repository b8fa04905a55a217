"""What a cell of a dataset holds: nothing, text, or the reason why its row cannot be used."""

import json
from collections.abc import Mapping, Sequence

from ..errors import FNSFTError


_TEXT_PARTS = (None, "text", "input_text", "output_text")  # as chat APIs name them


class UnusableRow(FNSFTError):
    """A row that cannot be used, and why. Where others can, it is left out and counted."""


def is_empty(value) -> bool:
    """Whether a cell holds nothing: null, NaN, white space, an empty list, or a SQuAD answer without text."""
    if value is None or value != value:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return is_empty(_squad_answer(value)) if "text" in value else not value
    if is_parts(value):
        return all(_is_text(part) and is_empty(part.get("text")) for part in value)
    return isinstance(value, Sequence) and len(value) == 0


def is_parts(value) -> bool:
    """Whether a value is a content in parts, `[{"type": "text", "text": ...}, ...]`, and not a list of messages."""
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return False
    return all(part.keys() & {"type", "text"} and not part.keys() & {"role", "from"} for part in value)


def _is_text(part: Mapping) -> bool:
    return part.get("type") in _TEXT_PARTS


def text_of(value, name: str) -> str:
    """The text of a cell or of a message's content.

    Args:
        value: text, a number or truth value, a SQuAD answer, a content in parts, or nothing.
        name: what messages call it.

    Raises:
        UnusableRow: it is something else, or one of the parts is no text.
    """
    if value is None or isinstance(value, str):
        return encodable(value or "", name)
    if isinstance(value, bool | int | float):
        return "" if is_empty(value) else str(value)
    if is_parts(value):
        return "".join(_part_text(part, name) for part in value)
    if isinstance(value, Mapping) and "text" in value:
        return text_of(_squad_answer(value), name)
    raise UnusableRow(f"{name} holds a {type(value).__name__}; expected text")


def encodable(text: str, name: str) -> str:
    """A text as it is.

    Raises:
        UnusableRow: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(f"{name} holds half a surrogate pair, which is no text") from error
    return text


def check_texts(value, name: str) -> None:
    """See that all texts of a structure are text.

    Raises:
        UnusableRow: one of them holds half a surrogate pair.
    """
    encodable(json.dumps(value, ensure_ascii=False, default=str), name)


def _squad_answer(value: Mapping):
    texts = value["text"]
    return texts[0] if isinstance(texts, list) and texts else texts


def _part_text(part: Mapping, name: str) -> str:
    if not _is_text(part):
        raise UnusableRow(f"{name} has a part of the type {part['type']!r}, which is no text")
    text = part.get("text")
    if not isinstance(text, str | None):
        raise UnusableRow(f"{name} has a part whose text is a {type(text).__name__}")
    return encodable(text or "", name)


def without_nulls(value):
    """A structure without the keys whose value is null: Arrow fills them in where other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
