"""written_whole, files_written_whole: what is on disk is as it was or as it shall be, whatever fails or is killed."""

import ctypes
import errno
import filecmp
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from .errors import FNSFTError


if os.name == "posix":
    import fcntl


_READY = ".fnsft.ready"  # a folder in a folder: files that are whole, and are to move into their places
_OLD = ".fnsft.old"  # what they take the place of, until all of them are there
_ENTRIES = ("results.json", "config.json", "adapter_config.json")  # without which the others are not found
_OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE),
    *(errno.ENAMETOOLONG, errno.ENODEV, errno.ESTALE),
}
NATIVE_ERRORS = (SafetensorError, RuntimeError)  # of safetensors and of torch, where they write by themselves
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a folder beside its place, bring it to the disk, and rename it.

        with written_whole(path) as scratch:
            scratch.write_bytes(data)

    A file takes the place of an older one. Where the body or the disk fails, the older one stays and what was written
    beside it is removed; a killed process leaves that behind, in a hidden folder `.{name}.*`, until the next writing.

    Args:
        path: the file or the folder; the directory that it is in is made where it does not exist.

    Yields:
        The path to write to, where nothing is yet.

    Raises:
        OSError: the disk does not take it; or it is a folder, and one of that name is there already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with _hidden_folder(path, path.parent) as folder:
        scratch = folder / path.name
        yield scratch
        _bring_to_disk(scratch)
        os.replace(scratch, path)
        _bring_names_to_disk(path.parent)


def write_text_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file as [`written_whole`] does."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def files_written_whole(
    directory: str | os.PathLike, *, owned: Sequence[str] = (), exchanged: bool = False
) -> Iterator[Path]:
    """Write several files of a folder, of which others there are: all of them become the new ones, or none.

    They are written elsewhere first, and take their places when all of them are on the disk. Where one of them cannot,
    those before it are put back. Of several writers of a folder, each waits for its turn.

    Args:
        directory: the folder; made where it does not exist.
        owned: patterns of the names of what belongs to the files: an older one that is not written again is removed.
        exchanged: take the place of the whole folder at once, with all else that is in it, where the system can do
            that: a killed process then leaves no mixture. Else the file that others are found by (`config.json`,
            `adapter_config.json`) is away while they move, and the next writer finishes what a killed one began.

    Yields:
        A folder to write the files into, with their folders; empty.

    Raises:
        OSError: the disk does not take them.
    """
    directory = Path(os.path.realpath(directory))
    has_room = os.access(directory.parent, os.W_OK | os.X_OK) or not directory.parent.exists()
    if has_room:
        directory.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(directory.parent / f".{directory.name}.lock" if has_room else directory / ".fnsft.lock"):
        if not directory.exists():
            with written_whole(directory) as scratch:
                scratch.mkdir()
                yield scratch
            return
        remove_leftovers(directory)
        settle(directory)
        beside = has_room and exchanged and not os.path.ismount(directory) and not _is_inside(os.getcwd(), directory)
        with _hidden_folder(directory, directory.parent if beside else directory) as folder:
            scratch = folder / directory.name
            scratch.mkdir()
            yield scratch
            _bring_to_disk(scratch)
            if not (beside and _exchange(scratch, directory, owned)):
                _move(scratch, directory, owned)


@contextmanager
def one_writer(lock: str | os.PathLike, *, waits: bool = True) -> Iterator[None]:
    """Let one process, or thread, at a time run the body; the others wait.

    Args:
        lock: a file that is there meanwhile. A killed process leaves it behind, and the next one takes it over.
        waits: whether to wait for another one.

    Raises:
        TimeoutError: another one has the lock, and this one does not wait.
    """
    from filelock import FileLock

    with FileLock(lock, mode=0o600, blocking=waits):
        try:
            yield
        finally:
            # Before it is released: whoever waits for it sees that it is no longer there, and makes another one.
            Path(lock).unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what killed processes left beside a path in [`written_whole`]; what one that lives is writing stays."""
    path = Path(path)
    own = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}")  # as `tempfile` names folders
    names = os.listdir(path.parent) if path.parent.is_dir() else ()
    for folder in (path.parent / name for name in names if own.fullmatch(name)):
        lock = _lock(folder, waits=False)
        if lock is not None:
            with _closing(lock), suppress(FileNotFoundError):  # its process has removed it meanwhile
                if all(inside.name == path.name for inside in folder.iterdir()):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _hidden_folder(path: Path, parent: Path) -> Iterator[Path]:
    """A folder for what is to take the place of a path: locked, so that it is not taken for a leftover."""
    lock, folder = None, None
    while folder is None or not folder.exists():  # it was taken for one, before it was locked
        if lock is not None:
            os.close(lock)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=parent))
        lock = _lock(folder, waits=True)
    with _closing(lock):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _closing(lock: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, waits: bool) -> int | None:
    """Lock a folder for as long as this process lives and has not closed the descriptor that it gives.

    It gives `None` where another one has the lock and this one does not wait. So it does where there is no such
    folder, or where the system has no such locks.
    """
    if os.name != "posix":
        return None
    number = None
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(number, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if number is not None:
            os.close(number)
        return None
    return number


def settle(directory: Path) -> None:
    """Finish what a killed writer of a folder began: called by the one writer of it, never by a reader."""
    ready, old = directory / _READY, directory / _OLD
    if ready.is_dir():
        for name in _in_order(ready):
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(ready / name, directory / name)
        ready.rmdir()
    shutil.rmtree(old, ignore_errors=True)
    remove_leftovers(directory / directory.name)  # its scratch may have been in it


def _move(scratch: Path, directory: Path, owned: Sequence[str]) -> None:
    """Move files into their places in a folder, and put all back if one of them cannot."""
    ready, old = directory / _READY, directory / _OLD
    written = _in_order(scratch)
    names = [name for name in written if not _is_same(scratch / name, directory / name)]
    for name in set(written) - set(names):
        (scratch / name).unlink()
    left = [name for name in _in_order(directory) if name not in written and _is_any(name, owned)]
    gone = left + [name for name in names if os.path.lexists(directory / name)]
    moves = [(directory / name, old / name) for name in reversed(gone)]  # what the others are found by goes first
    moves += [(ready / name, directory / name) for name in names]
    old.mkdir()
    os.replace(scratch, ready)
    done = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((target, source))
    except BaseException:
        for source, target in reversed(done):
            os.replace(source, target)
        shutil.rmtree(ready, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        raise
    ready.rmdir()
    _bring_names_to_disk(directory)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(scratch: Path, directory: Path, owned: Sequence[str]) -> bool:
    """Put a folder in the place of another one, with all else that is in that one; `False` where it cannot be done."""
    names = set(os.listdir(scratch))
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    others = [name for name in os.listdir(directory) if name not in names and not _is_any(name, owned)]
    try:
        for name in others:  # one file under two names, so that it is in both folders at every moment
            _link(directory / name, scratch / name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        _unlink(scratch, others)
        return False
    shutil.copymode(directory, scratch)
    if renameat2(_HERE, os.fsencode(scratch), _HERE, os.fsencode(directory), _EXCHANGE):
        _unlink(scratch, others)
        return False
    _bring_names_to_disk(directory.parent)
    return True


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    else:
        os.link(source, target, follow_symlinks=False)


def _unlink(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _in_order(folder: Path) -> list[str]:
    """What is in a folder, and last of all the file by which others are found."""
    names = (found.name for found in folder.iterdir())
    return sorted(names, key=lambda name: (_ENTRIES.index(name) if name in _ENTRIES else -1, name))


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_same(new: Path, old: Path) -> bool:
    return new.is_file() and old.is_file() and filecmp.cmp(new, old, shallow=False)


def _is_inside(path: str, directory: Path) -> bool:
    return directory == Path(path) or directory in Path(path).parents


def _prefix(path: Path) -> str:
    return f".{path.name.lstrip('.')}."


def _bring_to_disk(path: Path) -> None:
    """Without this, a machine that loses power after the renaming may have the name without the content."""
    for found in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if found.is_dir():
            _bring_names_to_disk(found)
        else:
            with found.open("rb+") as opened:
                os.fsync(opened.fileno())


def _bring_names_to_disk(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(directory, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems have nothing to bring
                os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def disk_errors(path: str | os.PathLike | None = None) -> Iterator[None]:
    """Say in one line that the disk does not take what is written.

    Args:
        path: of an artefact that is written as a whole, so that what was there before still is; `None` where any file
            may be meant.

    Raises:
        FNSFTError: in the place of the system's error, or of the one of a library that writes by itself.
    """
    try:
        yield
    except FNSFTError:
        raise
    except (OSError, *NATIVE_ERRORS) as error:
        told = disk_error(error)
        if told is None:
            raise
        if path is not None:
            raise FNSFTError(
                f"{os.fspath(path)} cannot be written ({told}); what was there before still is: make room, or choose "
                "another place"
            ) from error
        place = getattr(error, "filename", None)
        where = f"{os.fsdecode(place)}: " if isinstance(place, (str, bytes)) else ""
        raise FNSFTError(f"the disk refused a file ({where}{told}); make room or choose another place") from error


def disk_error(error: BaseException) -> str | None:
    """What an error says of the disk; `None` if it says nothing of it."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _OF_THE_DISK else None
    number = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))  # as safetensors says it
    if number and int(number[1]) in _OF_THE_DISK:
        return os.strerror(int(number[1]))
    return "No space left on device" if "PytorchStreamWriter failed writing" in str(error) else None
