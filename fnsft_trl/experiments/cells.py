"""Cells: what an experiment has finished, one JSON line for each arm and seed, on disk whole at any moment."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from ..finite import check_entries
from ..json_text import WRONG_VALUES, from_json
from ..writing import remove_leftovers, written_whole
from .arms import Arm, versions


Key = tuple  # of a cell: its arm and seed, or what else it is found by

_MOST_SHOWN = 4
_CHANGES = ("settings", "sources", "versions")  # of a cell, which are compared with those of now


class Cells:
    """The finished cells of an experiment, in a file.

    Args:
        path (`str` or `os.PathLike`): of the file; this process must be the only one that writes to it.
        by (`tuple[str, ...]`): the entries of a cell by which it is found, defaults to its arm and its seed.

    Attributes:
        found (`dict`): values of these entries -> cell.

    Raises:
        FNSFTError: it holds something else.
    """

    def __init__(self, path: str | os.PathLike, *, by: Sequence[str] = ("arm", "seed")) -> None:
        self.path = Path(path)
        self.by = tuple(by)
        self.found: dict[Key, dict[str, Any]] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            for line in lines:
                cell = from_json(line)
                if not all(isinstance(cell.get(name, {}), dict) for name in _CHANGES):
                    raise ValueError(f"{', '.join(_CHANGES)} are mappings")
                check_measured(cell)
                self.found[self._key(cell)] = cell
            sorted(self.found)  # as they are written
        except (OSError, *WRONG_VALUES) as error:
            raise FNSFTError(
                f"{self.path} holds no cells of an experiment ({error}); choose another output directory"
            ) from error

    def add(self, cell: dict[str, Any]) -> None:
        """Add a finished cell, and bring all of them to the disk.

        Raises:
            FNSFTError: something that was measured is NaN or infinite.
        """
        check_measured(cell)
        self.found[self._key(cell)] = cell
        self._write()

    def drop(self, keys: Sequence[Key]) -> None:
        """Forget some cells."""
        for key in keys:
            del self.found[key]
        self._write()

    def _key(self, cell: Mapping[str, Any]) -> Key:
        return tuple(cell[name] for name in self.by)

    def _write(self) -> None:
        lines = [json.dumps(cell) + "\n" for _, cell in sorted(self.found.items())]
        remove_leftovers(self.path)
        with written_whole(self.path) as scratch:
            scratch.write_text("".join(lines), encoding="utf-8")

    def changed(self, arms: Sequence[Arm]) -> dict[Key, str]:
        """The cells that arms of these names would not give now, with what has changed since, in words."""
        by_name, now = {arm.name: arm for arm in arms}, versions()
        found = {}
        for key, cell in self.found.items():
            name = cell["arm"]
            if name not in by_name:
                continue
            arm = by_name[name]
            settings, sources, then = (cell.get(name, {}) for name in _CHANGES)
            said = [
                *_differences(settings, arm.settings),
                *_content(sources, arm.sources),
                *(f"the version of {text}" for text in _differences(then, now)),
            ]
            if said:
                more = f" and {len(said) - _MOST_SHOWN} more" if said[_MOST_SHOWN:] else ""
                found[key] = "; ".join(said[:_MOST_SHOWN]) + more
        return found


def check_measured(cell: Mapping[str, Any]) -> None:
    """See that all that was measured of a cell is a number, before arms are compared by it.

    Raises:
        FNSFTError: something is NaN or infinite.
    """
    measured = {name: entry for name, entry in cell.items() if name not in _CHANGES}
    do = "nothing of this cell is kept; train it at a lower learning_rate, or in float32"
    check_entries(measured, f"values of {cell.get('arm', 'a cell')}, seed {cell.get('seed', '-')}", do)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, with both."""
    names = [name for name in [*now, *(name for name in then if name not in now)] if then.get(name) != now.get(name)]
    return [f"{name} was {_shown(then, name)} and is now {_shown(now, name)}" for name in names]


def _content(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose content has changed; which files are read, the settings say."""
    return [f"the content of {path} is not what it was" for path in now if then.get(path, now[path]) != now[path]]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not given"
