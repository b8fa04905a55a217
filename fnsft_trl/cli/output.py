"""Where a verb writes to, checked before anything is loaded."""

import os
from pathlib import Path

from ..errors import FNSFTError


def check_writable(directory: str | os.PathLike) -> Path:
    """Check, without writing anything, that a directory can be made or written into.

    Raises:
        FNSFTError: it cannot.
    """
    try:
        path = Path(directory).expanduser()
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, or of nobody (~name)
        raise FNSFTError(f"the output directory {directory} cannot be made: {error}; choose another one") from error
    if not nearest.is_dir():
        raise FNSFTError(f"the output directory {path} cannot be made: {nearest} is a file; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FNSFTError(f"the output directory {path} cannot be written: no permission in {nearest}; choose another")
    return path
