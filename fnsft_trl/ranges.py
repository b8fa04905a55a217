"""Sets of indices as text: `"0-5,9"`. Free of torch."""

import re
from collections.abc import Iterable, Sequence

from .errors import FNSFTError


def parse_ranges(spec: str | int | Sequence[int], size: int, *, what: str = "layer") -> list[int]:
    """Expand an index specification into a sorted list without repeats.

    Args:
        spec: `"all"`, or comma-separated items, each an index `9`, an inclusive range `0-5`, or a Python slice `0:4`
            (its end is left out); brackets around them are ignored. A list of indices is taken as it is.
        size: number of valid indices; all results are in `0 .. size - 1`.
        what: the noun of the error message.

    Raises:
        FNSFTError: an item is not understood, is out of range, or nothing is left.
    """
    items = [spec] if isinstance(spec, int) else spec
    if isinstance(items, str):
        text = items.strip().strip("[]").strip()
        items = ["0:"] if text == "all" else [item.strip() for item in text.split(",") if item.strip()]
    chosen: set[int] = set()
    for item in items:
        if match := re.fullmatch(r"(\d+)", str(item)):
            first, last = int(match[1]), int(match[1])
        elif match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", str(item)):
            first, last = int(match[1]), int(match[2])
        elif match := re.fullmatch(r"(\d*)\s*:\s*(\d*)", str(item)):
            first, last = int(match[1] or 0), int(match[2] or size) - 1
        else:
            raise FNSFTError(
                f"{what} specification {spec!r}: {item!r} is not understood; write all, 3, 0-5 (inclusive), 0:4 (end "
                "left out), or several with commas"
            )
        if not (0 <= first <= last < size):
            raise FNSFTError(f"{what} specification {spec!r}: {item!r} is outside 0-{size - 1} or empty")
        chosen.update(range(first, last + 1))
    if not chosen:
        raise FNSFTError(f"{what} specification {spec!r} names no {what}; there are {what}s 0-{size - 1}")
    return sorted(chosen)


def format_ranges(indices: Iterable[int]) -> str:
    """Write sorted indices in the shortest form that [`parse_ranges`] reads: `"0-5,9"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
