"""Where this package keeps what it need not make twice."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The directory of what this package keeps for the user: `$FNSFT_CACHE`, or `fnsft_trl` in the user's cache."""
    root = os.environ.get("FNSFT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fnsft_trl"
    return Path(root).expanduser()
