"""Where a verb writes to, checked before anything is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from ..occupied import check_target


def check_writable(
    directory: str | os.PathLike, kind: str | None = None, sources: Mapping[str, Any] | None = None
) -> Path:
    """Check, without writing anything, that a directory can be made or written into.

    Args:
        directory: where to write.
        kind, sources: what is to be written, and what is read: see [`~fnsft_trl.occupied.check_target`].

    Raises:
        FNSFTError: it cannot, or something there would be destroyed.
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
    if kind is not None:
        check_target(path, kind, sources=sources)
    return path
