"""`option`: a field of a config that states its default, help, choices and range once. Free of torch."""

import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from .errors import FNSFTError


_KINDS = {
    **{bool: "true or false", int: "a whole number", float: "a finite number", str: "text"},
    **{list[int]: "a list of one or more whole numbers", list[float]: "a list of one or more finite numbers"},
    list[str]: "a list of one or more texts",
}
_WIDTH = 119

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Range:
    """The numbers that a field, or each item of its list, may be.

    Attributes:
        least (`float` or `None`): the lowest of them.
        most (`float` or `None`): the highest of them.
        above (`float` or `None`): a bound that is not one of them.
        below (`float` or `None`): the same, from above.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def text(self) -> str:
        """The range as it follows `it must be`."""
        if self.least is not None and self.most is not None:
            return f"from {self.least:,} to {self.most:,}"
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a dataclass that holds options.

    Args:
        default: a value of a type that cannot change; `None` where the annotation allows it.
        help: whole sentences, for the command line and the docstring; the range is added to them.
        choices: the texts that it may be. With a default of `None`, `null` is one more.
        least: the lowest number that it, or each item of its list, may be.
        most: the highest one.
        above: a number that it must exceed.
        below: a number that it must stay below.

    Returns:
        A dataclass field, with `help` and, where there are some, `choices` and `range` (a [`Range`]) as metadata.
    """
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(choices) if default is not None else ("null", *choices)
    bounds = Range(least, most, above, below)
    if bounds != Range():
        metadata |= {"help": f"{help} {bounds.text.capitalize()}.", "range": bounds}
    return field(default=default, metadata=metadata)


def documented(cls: T) -> T:
    """Class decorator: the fields of a dataclass, with type, default and help, as the `Args` of its docstring."""
    lines = ["Args:"]
    for f in fields(cls):
        kinds = " or ".join(f"`{_name(kind)}`" for kind in _kinds(f))
        shown = f'"{f.default}"' if isinstance(f.default, str) else f.default
        default = "" if f.default is None else f", defaults to `{shown}`"
        lines.append(f"    {f.name} ({kinds}, *optional*{default}):")
        text = textwrap.fill(f.metadata["help"], _WIDTH - 8, break_on_hyphens=False)
        lines.append(textwrap.indent(text, " " * 8))
    summary, raises, errors = inspect.cleandoc(cls.__doc__ or "").partition("Raises:\n")
    cls.__doc__ = "\n\n".join([summary.rstrip(), "\n".join(lines), raises + errors]).strip()
    return cls


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its annotation, its choices and its range.

    Raises:
        FNSFTError: a value that its field does not take, with what it takes.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if (expected := _unmet(f, value)) is not None:
            raise FNSFTError(f"{f.name} is {value!r}; it must be {expected}")


def _unmet(f: Field, value: Any) -> str | None:
    """What a value of this field must be; `None` if it is that."""
    choices, bounds, is_nullable = f.metadata.get("choices"), f.metadata.get("range"), f.default is None
    if choices is not None:
        return None if ("null" if value is None else value) in choices else f"one of: {', '.join(choices)}"
    if value is None and is_nullable:
        return None
    if not any(fits(value, kind) for kind in _kinds(f)):
        range_text = f" ({bounds.text})" if bounds else ""
        kinds = [_KINDS[kind] + (range_text if kind is not str else "") for kind in _kinds(f)]
        return " or ".join(kinds) + (", or null" if is_nullable else "")
    if bounds is None or isinstance(value, str):
        return None
    if all(item in bounds for item in (value if isinstance(value, list) else [value])):
        return None
    return f"numbers, each {bounds.text}" if isinstance(value, list) else bounds.text


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: `bool`, `int` and no bool, `float` (finite; any int), `str`, or a list of one."""
    if get_origin(kind) is list:
        return isinstance(value, list) and bool(value) and all(fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and float("-inf") < value < float("inf")
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def is_free_text(f: Field) -> bool:
    """Whether a field takes any text."""
    return _kinds(f) == [str] and "choices" not in f.metadata


def _kinds(f: Field) -> list[Any]:
    """The types that a field's annotation names, without `None`."""
    parts = (f.type,) if get_origin(f.type) is list else get_args(f.type) or (f.type,)
    return [part for part in parts if part is not NoneType]


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
