"""What the verbs share: argument parsers made from the config, and checks made before anything is loaded."""

import argparse
import os
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import get_args

from ..config import FunctionalNetworkConfig
from ..errors import FNSFTError


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations and reports a wrong call on one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> None:
        raise FNSFTError(f"{message} (see --help)")


def add_config_arguments(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add options for fields of [`FunctionalNetworkConfig`], with their help and defaults."""
    by_name = {f.name: f for f in fields(FunctionalNetworkConfig)}
    for name in names:
        field = by_name[name]
        (kind,) = {*(get_args(field.type) or (field.type,))} - {NoneType}
        parser.add_argument(
            f"--{name}", type=kind, default=field.default, help=field.metadata["help"], metavar="VALUE"
        )


def check_writable(directory: str | os.PathLike) -> Path:
    """Check, without writing anything, that a directory can be made or written into.

    Raises:
        FNSFTError: it cannot.
    """
    path = Path(directory).expanduser()
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise FNSFTError(f"the output directory {path} cannot be made: {nearest} is a file; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FNSFTError(f"the output directory {path} cannot be written: no permission in {nearest}; choose another")
    return path
