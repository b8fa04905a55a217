"""A disk that fails at a chosen step, at the level of `os` and `open`: for tests of everything that is written.

    for disk in at_every_step(action, prepared, how):
        assert ... # what `action` left on disk, and `disk.error`

What a library writes without Python (safetensors, torch) is met by [`file_size_limit`].
"""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

import pytest


HOW = ("fails", "full", "killed")
_CALLS = ("replace", "rename", "fsync", "mkdir", "link", "unlink", "remove", "rmdir")
_SPACE = ("open", "write", "mkdir", "fsync", "link")  # which a full disk refuses


class Killed(BaseException):
    """The process is dead: nothing that it does reaches the disk any more."""


class Disk:
    """Counts the changes of a disk, and fails at one of them.

    Args:
        root: what is below it counts.
        at: number of the change that fails, from 0; `None` counts only.
        how: `fails`, this one alone; `full`, from then on all that need space; `killed`, from then on everything.

    Attributes:
        seen (`list[str]`): the changes that were made or refused, as `name file`.
        error (`BaseException` or `None`): what came out of the action.
    """

    def __init__(self, root: Path, at: int | None = None, how: str = "fails") -> None:
        self.root, self.at, self.how = os.path.realpath(root), at, how
        self.seen: list[str] = []
        self.error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        return self.at is not None and len(self.seen) > self.at

    def change(self, name: str, path) -> bool:
        """Count a change, and raise if it is to fail."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        place = os.path.abspath(os.fsdecode(path))
        if place != self.root and not place.startswith(self.root + os.sep):
            return
        self.seen.append(f"{name} {os.path.relpath(place, self.root)}")
        number = len(self.seen) - 1
        if self.at is None or number < self.at:
            return
        if self.how == "killed":
            raise Killed(self.seen[-1])
        if number == self.at if self.how == "fails" else name in _SPACE:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(place))

    @contextmanager
    def broken(self) -> Iterator["Disk"]:
        """The disk, for the length of a block; what comes out of the block is kept in `error`."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            opened = self._opened(builtins.open)
            patch.setattr(builtins, "open", opened)
            patch.setattr(io, "open", opened)
            try:
                yield self
            except (Exception, Killed) as error:
                self.error = error

    def _counted(self, name: str, call: Callable) -> Callable:
        def counted(path, *args, **kwargs):
            if kwargs.get("dir_fd") is not None and not isinstance(path, int):
                path_of = os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), os.fsdecode(path))
            else:
                path_of = args[0] if name in ("replace", "rename", "link") and args else path
            self.change(name, path_of)
            if name != "fsync":  # which matters only where the machine loses power, and takes most of the time
                return call(path, *args, **kwargs)

        return counted

    def _opened(self, call: Callable) -> Callable:
        def opened(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or isinstance(file, int):
                return call(file, mode, *args, **kwargs)
            self.change("open", file)
            return _Written(self, call(file, mode, *args, **kwargs), file)

        return opened


class _Written:
    """A file, of which a write that fails has written the first half."""

    def __init__(self, disk: Disk, file, path) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data):
        try:
            self._disk.change("write", self._path)
        except BaseException:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __iter__(self):
        return iter(self._file)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *raised):
        return self._file.__exit__(*raised)


def at_every_step(action: Callable[[], object], root: Path, how: str, *, prepare: Callable[[], object]):
    """Run an action as often as it makes changes, each time with a disk that fails at the next of them.

    Args:
        action: writes below `root`.
        root: the folder of the test.
        how: one of `HOW`.
        prepare: puts everything as it was before the action.

    Yields:
        The disk after each failure: `error` is what the action raised, `None` where it did without the change.
    """
    number = 0
    while True:
        prepare()
        disk = Disk(root, number, how)
        with disk.broken():
            action()
        if not disk.has_failed:
            assert disk.error is None, disk.error
            assert number, "the action changes nothing"
            return
        yield disk
        number += 1


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond a size, whoever writes it: what a library of its own meets on a full disk."""
    resource = pytest.importorskip("resource")  # not on Windows
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without hidden ones: what a reader may find there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found[name] = path.read_bytes()
    return found
