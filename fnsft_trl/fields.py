"""`option`: a field of a config that states its default, help, choices and range once. Free of torch."""

import inspect
import os
import textwrap
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import FNSFTError


_KINDS = {
    **{bool: "true or false", int: "a whole number", float: "a finite number", str: "text"},
    **{list[int]: "a list of one or more whole numbers", list[float]: "a list of one or more finite numbers"},
    list[str]: "a list of one or more texts",
}
LARGEST_SEED = 2**32 - 1  # that NumPy takes
_NULLS = ("null", "none", "None")
_WIDTH = 119

C = TypeVar("C")
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


class Help(str):
    """The help of a field, with the range of its numbers.

    `HfArgumentParser` hands all metadata of a field to argparse, which takes no key for a range.

    Attributes:
        range (`Range` or `None`): the numbers that the field may be.
    """

    range: Range | None = None


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
        A dataclass field, with `help` (a [`Help`]) and, where there are some, `choices` as metadata.
    """
    bounds = Range(least, most, above, below)
    metadata: dict[str, Any] = {"help": Help(help if bounds == Range() else f"{help} {bounds.text.capitalize()}.")}
    metadata["help"].range = None if bounds == Range() else bounds
    if choices is not None:
        metadata["choices"] = tuple(choices) if default is not None else ("null", *choices)
    return field(default=default, metadata=metadata)


def range_of(f: Field) -> Range | None:
    """The numbers that a field may be; `None` if any."""
    text = f.metadata.get("help")
    return text.range if isinstance(text, Help) else None


def documented(cls: T) -> T:
    """Class decorator: the fields of a dataclass, with type, default and help, as the `Args` of its docstring."""
    lines = ["Args:"]
    for f in fields(cls):
        kinds = " or ".join(f"`{_name(kind)}`" for kind in _kinds(cls)[f.name])
        shown = f'"{f.default}"' if isinstance(f.default, str) else f.default
        default = "" if f.default is None else f", defaults to `{shown}`"
        lines.append(f"    {f.name} ({kinds}, *optional*{default}):")
        text = textwrap.fill(f.metadata["help"], _WIDTH - 8, break_on_hyphens=False)
        lines.append(textwrap.indent(text, " " * 8))
    summary, raises, errors = inspect.cleandoc(cls.__doc__ or "").partition("Raises:\n")
    cls.__doc__ = "\n\n".join([summary.rstrip(), "\n".join(lines), raises + errors]).strip()
    return cls


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its annotation, its choices and its range, in its plain form.

    Raises:
        FNSFTError: a value that its field does not take, with what it takes.
    """
    make_plain(config)
    for f in fields(config):
        value = getattr(config, f.name)
        if (expected := _unmet(f, value, _kinds(type(config))[f.name])) is not None:
            raise FNSFTError(f"{f.name} is {value!r}; it must be {expected}")


def make_plain(config: Any) -> None:
    """Bring values of a dataclass that may be written in several ways into one form.

    Numbers of NumPy, paths, tuples, ranges and arrays become what JSON has in their place. One text becomes a list
    where a list of texts is expected. `null` as text becomes `None` where a field takes it but not any text.
    """
    for f in fields(config):
        kinds, value = _kinds(type(config))[f.name], _plain(getattr(config, f.name))
        if f.default is None and value in _NULLS and (str not in kinds or len(kinds) > 1 or "choices" in f.metadata):
            value = None
        elif isinstance(value, str) and kinds == [list[str]]:
            value = [value]
        elif isinstance(value, str) and kinds == [float, str]:
            with suppress(ValueError):
                value = float(value) if fits(float(value), float) else value
        setattr(config, f.name, value)


def checked(config: C | None, kind: type[C], name: str) -> C | None:
    """A config that a function is given, checked again, since its fields can have been set after it was made.

    Args:
        config: as given.
        kind: the dataclass that it must be of.
        name: of the argument, for the message.

    Returns:
        A copy.

    Raises:
        FNSFTError: it is something else, or a value in it has no meaning.
    """
    if config is None:
        return None
    if not isinstance(config, kind):
        remedy = f"; {kind.__name__}(**{name}) makes one" if isinstance(config, Mapping) else ""
        raise FNSFTError(f"{name} is a {type(config).__name__}; it must be a {kind.__name__}, or None{remedy}")
    return replace(config)


def _plain(value: Any) -> Any:
    """A value as JSON has it, where there is a plain form of it."""
    if value is None or isinstance(value, bool | Mapping | Set | bytes):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Iterable):
        with suppress(TypeError):  # an array of no dimension
            return [_plain(item) for item in value]
    return value


def _unmet(f: Field, value: Any, kinds: list[Any]) -> str | None:
    """What a value of this field must be; `None` if it is that."""
    choices, bounds, is_nullable = f.metadata.get("choices"), range_of(f), f.default is None
    if choices is not None:
        return None if ("null" if value is None else value) in choices else f"one of: {', '.join(choices)}"
    if value is None and is_nullable:
        return None
    if not any(fits(value, kind) for kind in kinds):
        range_text = f" ({bounds.text})" if bounds else ""
        told = [_KINDS[kind] + (range_text if kind is not str else "") for kind in kinds]
        return " or ".join(told) + (", or null" if is_nullable else "")
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


@cache
def _kinds(cls: type) -> dict[str, list[Any]]:
    """Field -> the types that its annotation names, without `None`.

    Not those of `Field.type`, which `HfArgumentParser` overwrites.
    """
    hints = get_type_hints(cls)
    parts = {name: (hint,) if get_origin(hint) is list else get_args(hint) or (hint,) for name, hint in hints.items()}
    return {name: [part for part in parts if part is not NoneType] for name, parts in parts.items()}


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
