"""The two places that options of `fnsft train` come from: a YAML file and the command line."""

import difflib
from typing import Any

import yaml

from ...errors import FNSFTError
from .schema import OURS, Option
from .values import read_value


COMMAND_LINE = "the command line"


def read_sources(argv: list[str], known: dict[str, Option]) -> dict[str, dict[str, Any]]:
    """Read the command line, and the YAML file that its `--config` names.

    Args:
        argv: the arguments.
        known: the options there are, by name.

    Returns:
        Where options stand (the path of the YAML file, [`COMMAND_LINE`]), the weakest first -> name as it is spelt
        there -> checked value.

    Raises:
        FNSFTError: a name that is not known, a value that its option cannot have, or a file that is no YAML mapping.
    """
    words, path = _split(argv, known)
    sources = {path: _read_yaml(path, known)} if path is not None else {}
    sources[COMMAND_LINE] = words
    return {
        source: {name: read_value(known[name], value, name) for name, value in written.items()}
        for source, written in sources.items()
    }


def _split(argv: list[str], known: dict[str, Option]) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """The words of every option, the last time that it stands there, and the path of the YAML file."""
    found: dict[str, tuple[str, ...]] = {}
    path = None
    position = 0
    while position < len(argv):
        flag, separator, value = argv[position].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise FNSFTError(f"{argv[position]!r} is no option; options start with -- (see --help)")
        position += 1
        words = [value] if separator else []
        while not separator and position < len(argv) and not argv[position].startswith("--"):
            words.append(argv[position])
            position += 1
        name = flag[2:].replace("-", "_")
        if name == "config":
            if len(words) != 1 or path is not None:
                raise FNSFTError("--config takes one YAML file, once")
            path = words[0]
            continue
        positive = name.removeprefix("no_")
        if name not in known and positive != name and positive in known and known[positive].kind == "bool":
            if words:
                raise FNSFTError(f"--{name} takes no value; write --{name}, or --{positive} true or false")
            name, words = positive, ["false"]
        if name not in known:
            raise FNSFTError(f"there is no option --{name}{_nearest(name, known)}")
        found[name] = tuple(words)
    return found, path


def _read_yaml(path: str, known: dict[str, Option]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except OSError as error:
        raise FNSFTError(f"the config file {path!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise FNSFTError(f"the config file {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise FNSFTError(f"the config file {path} must hold a mapping of option names to values")
    for name, value in settings.items():
        if name not in known:
            nested = " (options are not nested: write them at the top level)" if isinstance(value, dict) else ""
            raise FNSFTError(f"{path}: there is no option {name!r}{_nearest(str(name), known)}{nested}")
    ours = {kind.__name__ for kind in OURS}  # of which null means the default
    return {name: value for name, value in settings.items() if value is not None or known[name].group not in ours}


def _nearest(name: str, known: dict[str, Option]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
