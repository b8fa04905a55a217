"""check_finite: that values are numbers, before anything is told by them. Free of torch.

NaN is neither more nor less than anything. So `max`, `min`, sorting and every comparison give an answer that says
nothing, and no error.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import FNSFTError


# What to do where a loss is infinite or NaN and its difference from another one is asked for.
NO_DIFFERENCE = "load the model in float32, or leave out text with tokens that the model rules out (-inf)"


def check_finite(
    values: Iterable[float], what: str, do: str = "load the model in float32, or look at its weights"
) -> None:
    """See that all values are numbers.

    Args:
        values: as floats.
        what: they are, in words.
        do: what to do about one that is none.

    Raises:
        FNSFTError: one of them is NaN or infinite.
    """
    for value in values:
        if not math.isfinite(value):
            raise FNSFTError(f"{what}: one is {value}, which says nothing; {do}")


def check_entries(entries: Any, what: str, do: str) -> None:
    """The same of all floats in JSON values, at any depth.

    Args:
        entries: mappings, lists and plain values.
        what, do: as of [`check_finite`]; the place of the value is added.
    """
    if isinstance(entries, Mapping):
        for name, entry in entries.items():
            check_entries(entry, f"{what}, {name}", do)
    elif isinstance(entries, (list, tuple)):
        for entry in entries:
            check_entries(entry, what, do)
    elif isinstance(entries, float):
        check_finite([entries], what, do)


def largest(values: Iterable[float]) -> float:
    """The largest value, 0 of none; NaN where one is NaN, which `max` passes over."""
    return max(values, key=lambda value: (value != value, value), default=0.0)


def without_nan(value: Any) -> Any:
    """JSON values with null in the place of floats that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
