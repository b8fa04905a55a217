"""Where this package keeps what it need not make twice."""

import os
from pathlib import Path


_PRIVATE = 0o700


def cache_dir() -> Path:
    """The directory of what this package keeps for the user: `$FNSFT_CACHE`, or `fnsft_trl` in the user's cache."""
    root = os.environ.get("FNSFT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fnsft_trl"
    return Path(root).expanduser()


def make_private(directory: Path) -> None:
    """Make a directory that only the user can read, for what is kept there holds texts; one of the user's becomes so.

    Raises:
        OSError: the disk does not take it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
    found = directory.stat()
    if os.name == "posix" and found.st_mode & 0o077 and found.st_uid == os.getuid():
        directory.chmod(_PRIVATE)
