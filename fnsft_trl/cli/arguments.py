"""What the verbs share: argument parsers made from the config, and checks made before anything is loaded."""

import argparse
import os
import sys
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

    def parse_known_args(self, args=None, namespace=None):
        """As the parent's; flags may be written with dashes instead of underscores."""
        spelt = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in spelt], namespace)

    def error(self, message: str) -> None:
        raise FNSFTError(f"{message} (see --help)")


def _underscored(word: str) -> str:
    flag, separator, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + separator + value if flag.startswith("--") else word


def _truth(word: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return values[word.lower()]


def add_config_arguments(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add options for fields of [`FunctionalNetworkConfig`], with their help and defaults; `ica_` may be left out."""
    by_name = {f.name: f for f in fields(FunctionalNetworkConfig)}
    for name in names:
        field = by_name[name]
        kinds = {*(get_args(field.type) or (field.type,))} - {NoneType}
        kind = str if str in kinds else kinds.pop()
        short = name if name == "ica_dtype" else name.removeprefix("ica_")  # --dtype is the model's
        parser.add_argument(
            *dict.fromkeys((f"--{name}", f"--{short}")),
            dest=name,
            type=_truth if kind is bool else kind,
            default=field.default,
            help=field.metadata["help"],
            metavar="VALUE",
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
