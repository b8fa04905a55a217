"""The two places that options come from: a YAML file and the command line."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ...errors import FNSFTError
from .schema import TRL, Option
from .values import TRUTH, read_value
from .written import read_yaml


COMMAND_LINE = "the command line"

_CONFIG = Option("config", "", "str")


def read_sources(argv: list[str], known: dict[str, Option]) -> dict[str, dict[str, Any]]:
    """Read the command line, and the YAML file that its `--config` names.

    Args:
        argv: the arguments.
        known: the options there are, by name.

    Returns:
        Where options stand (the path of the YAML file, [`COMMAND_LINE`]), the weakest first -> name as it is spelt
        there -> checked value.

    Raises:
        FNSFTError: a name that is not known, an option that is given twice, a value that its option cannot have, or a
            file that is no YAML mapping.
    """
    known = {"config": _CONFIG, **known}
    words, path = _split(argv, known)
    sources = {path: read_mapping(read_yaml(path), known, path)} if path is not None else {}
    sources[COMMAND_LINE] = {name: read_value(known[name], value, name) for name, value in words.items()}
    return sources


def read_mapping(written: Mapping[str, Any], known: dict[str, Option], where: str) -> dict[str, Any]:
    """Options that stand in a mapping of a YAML file.

    Args:
        written: as [`~.written.read_yaml`] gives it.
        known: the options there are, by name.
        where: they stand, for messages.

    Returns:
        Name as it is spelt there -> checked value; null means the default, but for options of TRL.

    Raises:
        FNSFTError: a name that is not known, or a value that its option cannot have.
    """
    for name, value in written.items():
        if not _knows(name, known) or name == _CONFIG.name:
            nested = " (options are not nested: write them at the top level)" if isinstance(value, dict) else ""
            raise FNSFTError(f"{where}: there is no option {str(name)!r}{_nearest(name, known)}{nested}")
    given = {name: value for name, value in written.items() if value is not None or known[name].group in TRL}
    return {name: read_value(known[name], value, name) for name, value in given.items()}


def under_own_names(given: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The options of one source, without their other names.

    Args:
        given: name as it is spelt there -> value.
        names: other name -> the option's own.

    Raises:
        FNSFTError: an option stands there under two names.
    """
    values: dict[str, Any] = {}
    for spelt in sorted(given, key=names.__contains__):  # own names first
        name = names.get(spelt, spelt)
        if spelt in names and name in values:
            raise FNSFTError(f"{spelt} and {name} are two names of one option; drop {spelt}")
        values[name] = given[spelt]
    return values


def _split(argv: list[str], known: dict[str, Option]) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """The words of every option, and the path of the YAML file."""
    found: dict[str, tuple[str, ...]] = {}
    free: list[str] = []  # words without a flag: one run of them, for the options whose name may be left out
    may_be_free = any(option.positional for option in known.values())
    for flag, value, words in _by_flag(argv):
        taken = 0
        if flag is not None:
            name, is_negated = _named(flag, known)
            if value is not None:
                own = [value]
            else:
                taken = _count(known[name], words, is_negated) if may_be_free and not free else len(words)
                own = words[:taken]
            if is_negated and own:
                raise FNSFTError(f"{flag} takes no value; write {flag}, or --{name} true or false")
            if name == "config" and (len(own) != 1 or name in found):
                raise FNSFTError("--config takes one YAML file, once; put all options into that file")
            if name in found:
                raise FNSFTError(f"{name} is given twice on the command line; give it once")
            found[name] = ("false",) if is_negated else tuple(own)
        rest = words[taken:]
        stray = rest if free or not may_be_free else [word for word in rest if word.startswith("-")]
        if stray:
            raise FNSFTError(f"{stray[0]!r} is no option; options start with -- (see --help)")
        free += rest
    path = found.pop("config", (None,))[0]
    return found | _place(free, known, found), path


def _by_flag(argv: list[str]) -> Iterator[tuple[str | None, str | None, list[str]]]:
    """Every flag in turn, the value that stands behind its `=`, and the words up to the next flag."""
    starts = [number for number, word in enumerate(argv) if word.startswith("--")]
    yield None, None, argv[: starts[0] if starts else None]
    for start, end in pairwise([*starts, len(argv)]):
        flag, separator, value = argv[start].partition("=")
        yield flag, value if separator else None, argv[start + 1 : end]


def _named(flag: str, known: dict[str, Option]) -> tuple[str, bool]:
    """The option that a flag names, and whether it is its negation."""
    name = flag[2:].replace("-", "_")
    positive = name.removeprefix("no_")
    if not _knows(name, known) and positive != name and positive in known and known[positive].kind == "bool":
        return positive, True
    if name not in known:
        raise FNSFTError(f"there is no option --{name}{_nearest(name, known)}")
    return name, False


def _knows(name: str, known: dict[str, Option]) -> bool:
    """Whether there is such an option; one of a family becomes known by its own name."""
    family = next((o for o in known.values() if o.family and str(name).startswith(f"{o.name}_")), None)
    if name not in known and family is not None:
        known[name] = replace(family, name=name, family=False)
    return name in known


def _count(option: Option, words: list[str], is_negated: bool) -> int:
    """How many words after a flag are its value, where others may follow that belong to no flag."""
    if option.many:
        return len(words)
    if is_negated or not words:
        return 0
    if option.kind == "bool":
        return int(words[0].lower() in TRUTH or (option.takes_null and words[0].lower() in ("null", "none")))
    end = {"[": "]", "{": "}"}.get(words[0][:1])  # of what the shell has split
    return next((number for number, word in enumerate(words, 1) if end and word.endswith(end)), 1)


def _place(words: list[str], known: dict[str, Option], found: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The words without a flag, given to the options whose name may be left out, in turn."""
    named = {known[name].name for name in found}
    rest, placed = list(words), {}
    for name, option in known.items():
        if option.positional and name == option.name and name not in named and rest:
            count = len(rest) if option.many else 1
            placed[name], rest = tuple(rest[:count]), rest[count:]
    if rest:
        names = ", ".join(name for name, option in known.items() if option.positional and name == option.name)
        raise FNSFTError(f"{rest[0]!r} is one argument too many: {names} can be given without a name, once each")
    return placed


def _nearest(name: str, known: dict[str, Option]) -> str:
    """The name that is spelt like the one that was written, and those of which it is a part (`model`, `epochs`)."""
    parts = [each for each in known if f"_{name}_" in f"_{each}_" and each != name]
    parts.sort(key=lambda each: known[each].group not in TRL)  # for `batch_size`, that of the training first
    near = difflib.get_close_matches(name[:100], known.keys() - {name}, n=1)
    likely = list(dict.fromkeys([*near, *parts]))[:3]
    return f"; did you mean {' or '.join(map(repr, likely))}?" if likely else ""
