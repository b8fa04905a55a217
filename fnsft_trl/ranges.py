"""Sets of indices as text: `"0-5,9"`. Free of torch."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import FNSFTError


# Without zeros in front, which make a number octal elsewhere; of any size that a computer counts to.
_INDEX = r"(0|[1-9][0-9]{0,17})"


def parse_ranges(spec: str | int | Sequence[int | str], size: int, *, what: str = "layer") -> list[int]:
    """Expand an index specification into a sorted list without repeats.

    Args:
        spec: `"all"`, or comma-separated items, each an index `9`, an inclusive range `0-5`, or a Python slice `0:4`
            (its end is left out); brackets around them are ignored. A list may hold indices and such items.
        size: number of valid indices; all results are in `0 .. size - 1`.
        what: the noun of the error message.

    Raises:
        FNSFTError: an item is not understood, is out of range, or nothing is left.
    """
    chosen: set[int] = set()
    for item, first, end in _spans(spec, what):
        end = size if end is None else end
        if not 0 <= first < end <= size:
            raise FNSFTError(f"{what} specification {spec!r}: {item!r} is outside 0-{size - 1} or empty; stay within")
        chosen.update(range(first, end))
    if not chosen:
        raise FNSFTError(f"{what} specification {spec!r} names no {what}; there are {what}s 0-{size - 1}")
    return sorted(chosen)


def is_open(spec: str | int | Sequence[int | str], *, what: str = "layer") -> bool:
    """Whether an index specification reaches as far as there are indices, as `5:` and `all` do.

    Raises:
        FNSFTError: an item is not understood.
    """
    return any(end is None for _, _, end in _spans(spec, what))


def _spans(spec: str | int | Sequence[int | str], what: str) -> list[tuple[str | int, int, int | None]]:
    """Every item, with the first of its indices and the one after the last; `None` is the number that there are."""
    if not isinstance(spec, str | int | Iterable):
        raise FNSFTError(f"{what} specification {spec!r} is neither text nor a list of indices")
    items = [spec] if isinstance(spec, int) else spec
    if isinstance(items, str):
        text = items.strip().strip("[]").strip()
        items = ["0:"] if text == "all" else [item.strip() for item in text.split(",") if item.strip()]
    spans: list[tuple[str | int, int, int | None]] = []
    for item in items:
        if match := re.fullmatch(_INDEX, str(item)):
            spans.append((item, int(match[1]), int(match[1]) + 1))
        elif match := re.fullmatch(rf"{_INDEX}\s*-\s*{_INDEX}", str(item)):
            spans.append((item, int(match[1]), int(match[2]) + 1))
        elif match := re.fullmatch(rf"{_INDEX}?\s*:\s*{_INDEX}?", str(item)):
            spans.append((item, int(match[1] or 0), int(match[2]) if match[2] else None))
        else:
            raise FNSFTError(
                f"{what} specification {spec!r}: {item!r} is not understood; write all, 3, 0-5 (inclusive), 0:4 (end "
                "left out), or several with commas"
            )
    return spans


def ranges_text(value: Any, name: str, *, what: str = "layer") -> Any:
    """One text for what may be a number, a text, or a list of numbers and ranges; anything else as it is.

    Args:
        value: of a field.
        name: of the field, for the message.
        what: the noun of the message.

    Raises:
        FNSFTError: the text is no index specification.
    """
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, (int, str)) and not isinstance(item, bool) for item in items):
        return value
    text = ",".join(map(str, items)).strip("[]").replace(" ", "")
    try:
        _spans(text, what)
    except FNSFTError as error:
        raise FNSFTError(f"{name} is {value!r}; it must be numbers and ranges, such as 0-5,7 ({error})") from error
    return text


def format_ranges(indices: Iterable[int]) -> str:
    """Write sorted indices in the shortest form that [`parse_ranges`] reads: `"0-5,9"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
