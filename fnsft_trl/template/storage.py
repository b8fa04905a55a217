"""A template on disk: files written whole, and tensors checked before use. No torch until tensors are read."""

import hashlib
import json
import math
import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FNSFTError
from .description import FORMAT, check_config, tensor_shapes


if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
TENSOR_FILE = "template.safetensors"
CARD_FILE = "README.md"
FIGURE_FILE = "networks.svg"
FILES = (TENSOR_FILE, CARD_FILE, FIGURE_FILE, CONFIG_FILE)
NETWORK_DIR = "functional_networks"  # where a trained model keeps its template

_AGAIN = "save the template again, or fetch it again (`hf download --force-download`)"
_READY = ".template.ready"  # while it exists, a newer template waits beside the old one
_LARGEST_DESCRIPTION = 64 * 2**20  # bytes of config.json and of the tensors' header
_ITEM_SIZE = {"F32": 4, "F64": 8}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write the files of a template.

    Whoever is interrupted leaves the old template or the new one, whole: all are written under other names first, and
    a template found between two renames is completed before it is read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _READY).unlink(missing_ok=True)
    for name in FILES:
        _partial(directory, name).write_bytes(files[name])
    (directory / _READY).touch()
    _complete(directory)


def _partial(directory: Path, name: str) -> Path:
    return directory / f".{name}.partial"


def _complete(directory: Path) -> None:
    """Put files that were written completely in the place of the old ones."""
    if not (directory / _READY).exists():
        return
    for name in FILES:
        if _partial(directory, name).exists():
            os.replace(_partial(directory, name), directory / name)
    (directory / _READY).unlink()


def read_config(directory: Path) -> dict[str, Any]:
    """Read and check the `config.json` of a directory.

    Returns:
        The description in the form of the current version.

    Raises:
        FNSFTError: there is no template in the directory, or one that this version cannot read.
    """
    _complete(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FNSFTError(f"no template at {directory}: {CONFIG_FILE} is missing; make one with `fnsft discover`")
    return check_config(read_json(path), path)


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        FNSFTError: it cannot be read, is no JSON, or too large.
    """
    if path.stat().st_size > _LARGEST_DESCRIPTION:
        raise FNSFTError(f"{path} has {path.stat().st_size} bytes, too many for the description of a template")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise FNSFTError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise FNSFTError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def read_tensors(path: Path, config: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """Read the tensors of a template, if they are what its description asks for.

    Args:
        path: a safetensors file.
        config: the description, checked.

    Raises:
        FNSFTError: other names, types, shapes or bytes, or values that are not finite or out of range.
    """
    try:
        _check_header(path, config)
        data = path.read_bytes()
    except OSError as error:
        raise FNSFTError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    expected = config["tensors_sha256"]
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise FNSFTError(f"{path} is not the file that {CONFIG_FILE} describes (SHA-256); {_AGAIN}")

    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise FNSFTError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise FNSFTError(f"{path}: {name} holds values that are not finite; discover the networks again")
    for layer in config["widths"] if config["statistics"] else ():
        mean, rms = tensors[f"layers.{layer}.mean"], tensors[f"layers.{layer}.rms"]
        if (rms < 0).any() or (mean.abs() > rms * 1.001 + 1e-6).any():
            raise FNSFTError(f"{path}: layers.{layer}.rms cannot be the RMS of activations with that mean")
    return tensors


def _check_header(path: Path, config: dict[str, Any]) -> None:
    """Compare the header of a safetensors file, and the file's size, with what the description asks for."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _LARGEST_DESCRIPTION:
            raise FNSFTError(f"{path} cannot be read (its header does not fit into {size} bytes); {_AGAIN}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise FNSFTError(f"{path} cannot be read (its header is no JSON: {error}); {_AGAIN}") from error
    if not isinstance(header, dict):
        raise FNSFTError(f"{path} cannot be read (its header is no mapping); {_AGAIN}")
    metadata = header.pop("__metadata__", None)
    shapes = tensor_shapes(config)
    total = 0
    for name, shape in shapes.items():
        entry = header.pop(name, None)
        if not isinstance(entry, dict) or entry.get("shape") != list(shape):
            found = "nothing" if not isinstance(entry, dict) else f"shape {reprlib.repr(entry.get('shape'))}"
            raise FNSFTError(f"{path}: {name} should have shape {shape}, found {found}; {_AGAIN}")
        if entry.get("dtype") not in _ITEM_SIZE:
            raise FNSFTError(f"{path}: {name} is {reprlib.repr(entry.get('dtype'))}; it must be F32 or F64; {_AGAIN}")
        total += math.prod(shape) * _ITEM_SIZE[entry["dtype"]]
    if header:
        raise FNSFTError(f"{path} holds {reprlib.repr(min(header))}, which is no tensor of this template; {_AGAIN}")
    if metadata != {FORMAT: str(config["format_version"])}:
        raise FNSFTError(f"{path} is not of format {FORMAT!r} in the version of its {CONFIG_FILE}; {_AGAIN}")
    if size != 8 + length + total:
        raise FNSFTError(f"{path} has {size} bytes, its header asks for {8 + length + total}; {_AGAIN}")
