"""written_whole: a file or a folder that is on disk as it was or as it shall be, whatever fails or is killed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a folder beside its place, bring it to the disk, and rename it.

        with written_whole(path) as scratch:
            scratch.write_bytes(data)

    A file takes the place of an older one. Where the body or the disk fails, the older one stays and what was written
    beside it is removed; a killed process leaves that behind, in a hidden folder `.{name}.*`.

    Args:
        path: the file or the folder; the directory that it is in is made where it does not exist.

    Yields:
        The path to write to, where nothing is yet.

    Raises:
        OSError: the disk does not take it; or it is a folder, and one of that name is there already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name.lstrip('.')}.", dir=path.parent))
    try:
        scratch = folder / path.name
        yield scratch
        _bring_to_disk(scratch)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """Remove what killed processes left beside a path in [`written_whole`].

    It must be called by the one writer of the path, for what another one is writing looks the same.
    """
    path = Path(path)
    for folder in path.parent.glob(f".{path.name}.*"):
        if folder.is_dir() and all(inside.name == path.name for inside in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)


def _bring_to_disk(path: Path) -> None:
    """Without this, a machine that loses power after the renaming may have the name without the content."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
