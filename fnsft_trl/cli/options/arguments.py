"""Arguments, the values of all options in one call of a verb, read from both sources."""

from collections.abc import Iterable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from ...errors import FNSFTError
from .help import usage
from .schema import Option, by_name
from .sources import read_sources, under_own_names


class Arguments(SimpleNamespace):
    """The value of every option of one call, by name: what was given, or its default.

    Attributes:
        given (`frozenset[str]`): the options that were given.
    """

    given: frozenset[str]

    def of(self, kind: type) -> dict[str, Any]:
        """The values that are fields of a dataclass."""
        return {field.name: vars(self)[field.name] for field in fields(kind) if field.name in vars(self)}


def read_arguments(argv: list[str], options: Iterable[Option]) -> Arguments:
    """Read the arguments of a verb: the command line over YAML over defaults.

    Args:
        argv: the arguments.
        options: the options of the verb.

    Raises:
        FNSFTError: a name that is not known, a value that its option cannot have, an option under two names, or one
            that is missing.
    """
    known = by_name(options)
    names = {spelt: option.name for spelt, option in known.items() if spelt != option.name}
    values: dict[str, Any] = {}
    for given in read_sources(argv, known).values():
        values |= under_own_names(given, names)
    values = {name: value for name, value in values.items() if value is not None}
    missing = [option.name for option in options if option.required and not values.get(option.name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise FNSFTError(f"{' and '.join(missing)} {verb} missing; give {usage(options)}")
    return Arguments(**{option.name: option.default for option in options} | values, given=frozenset(values))
