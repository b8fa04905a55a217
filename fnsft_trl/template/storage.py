"""A template on disk: files written whole, and tensors checked before use. No torch until tensors are read."""

import hashlib
import math
import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import FNSFTError
from ..json_text import from_json
from ..writing import one_writer, written_whole
from .description import TemplateDescription
from .schema import FORMAT


if TYPE_CHECKING:
    import numpy as np

CONFIG_FILE = "config.json"
TENSOR_FILE = "template.safetensors"
CARD_FILE = "README.md"
FIGURE_FILE = "networks.svg"
FILES = (TENSOR_FILE, CARD_FILE, FIGURE_FILE, CONFIG_FILE)
NETWORK_DIR = "functional_networks"  # where a trained model keeps its template
SELECTION_FILE = "selection.json"  # in there: what its run selected, trained and masked

_AGAIN = "save the template again, or fetch it again (`hf download --force-download`)"
_READY = ".template.ready"  # a folder: what is in it is newer than what is beside it
_LOCK = ".template.lock"
_LARGEST_DESCRIPTION = 64 * 2**20  # bytes of config.json and of the tensors' header
_ITEM_SIZE = {"F32": 4, "F64": 8}


def write_files(directory: Path, files: dict[str, bytes | None]) -> None:
    """Write the files of a template; of several processes that write into one directory, each in its turn.

    Whoever is killed or fails leaves the old template or the new one, whole. The new one is written into a folder
    beside the old one. Once that folder is renamed, the old one no longer counts, though its files are still there:
    whoever reads looks into the folder first. Then file after file moves into its place.

    Args:
        directory: made where it does not exist.
        files: name -> content of all `FILES`, and of others that belong to them; `None` removes an older one.

    Raises:
        OSError: the disk does not take them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory / _LOCK):
        _settle(directory)
        with written_whole(directory / _READY) as scratch:
            scratch.mkdir()
            for name in (*FILES, *(files.keys() - set(FILES))):
                if files[name] is not None:
                    (scratch / name).write_bytes(files[name])
        _settle(directory)
        for name in files:
            if files[name] is None:
                (directory / name).unlink(missing_ok=True)


def _settle(directory: Path) -> None:
    """Move the files of a newer template into their places, and remove what killed writers did not finish."""
    ready = directory / _READY
    if ready.is_dir():
        for name in (*FILES, *(set(os.listdir(ready)) - set(FILES))):
            if (ready / name).exists():
                os.replace(ready / name, directory / name)
        ready.rmdir()
    for unfinished in directory.glob(f"{_READY}.*"):
        shutil.rmtree(unfinished)


def places(directory: Path, name: str) -> tuple[Path, Path]:
    """Where to look for a file of a template, in this order, as it moves from the first to the second place."""
    return directory / _READY / name, directory / name


def read_description(directory: Path) -> TemplateDescription:
    """Read and check the `config.json` of a directory.

    Raises:
        FNSFTError: there is no template in the directory, or one that this version cannot read.
    """
    path = directory / CONFIG_FILE
    if not any(place.is_file() for place in places(directory, CONFIG_FILE)):
        raise FNSFTError(f"no template at {directory}: {CONFIG_FILE} is missing; make one with `fnsft discover`")
    return TemplateDescription.from_json(read_json(*places(directory, CONFIG_FILE)), path)


def read_json(*places: Path) -> Any:
    """Read a file of JSON from the first of some places that has it.

    Raises:
        FNSFTError: it cannot be read, is no JSON, or too large.
    """
    path = places[-1]
    with _opened(places) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_DESCRIPTION:
            raise FNSFTError(f"{path} has {size} bytes, too many for the description of a template; {_AGAIN}")
        data = file.read()
    try:
        return from_json(data.decode("utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise FNSFTError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error


@contextmanager
def _opened(places: tuple[Path, ...]) -> Iterator[BinaryIO]:
    try:
        with _first(places) as file:
            yield file
    except OSError as error:
        raise FNSFTError(f"{places[-1]} cannot be read ({error.strerror}); {_AGAIN}") from error


def _first(places: tuple[Path, ...]) -> BinaryIO:
    *newer, last = places
    for place in newer:
        with suppress(FileNotFoundError, NotADirectoryError):
            return place.open("rb")
    return last.open("rb")


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def read_arrays(description: TemplateDescription, *places: Path) -> "dict[str, np.ndarray]":
    """Read the tensors of a template, if they are what its description asks for.

    Args:
        description: of the template.
        places: where to look for the safetensors file.

    Raises:
        FNSFTError: other names, types, shapes or bytes, or values that are not finite or out of range.
    """
    path = places[-1]
    with _opened(places) as file:
        _check_header(file, path, description)
        file.seek(0)
        data = file.read()
    expected = description.tensors_sha256
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise FNSFTError(f"{path} is not the file that {CONFIG_FILE} describes (SHA-256); {_AGAIN}")

    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise FNSFTError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise FNSFTError(f"{path}: {name} holds values that are not finite; discover the networks again")
    for layer in description.widths if description.statistics else ():
        mean, rms = tensors[f"layers.{layer}.mean"], tensors[f"layers.{layer}.rms"]
        if not are_statistics(mean, rms):
            raise FNSFTError(f"{path}: layers.{layer}.rms cannot be the RMS of activations with that mean")
    return tensors


def are_statistics(mean: Any, rms: Any) -> bool:
    """Whether activations can have such means and RMS, as arrays or tensors of one shape."""
    return not bool((rms < 0).any() or (abs(mean) > rms * 1.001 + 1e-6).any())


def _check_header(file: BinaryIO, path: Path, description: TemplateDescription) -> None:
    """Compare the header of a safetensors file, and the file's size, with what the description asks for."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or length > _LARGEST_DESCRIPTION:
        raise FNSFTError(f"{path} cannot be read (its header does not fit into {size} bytes); {_AGAIN}")
    try:
        header = from_json(file.read(length))
    except ValueError as error:
        raise FNSFTError(f"{path} cannot be read (its header is no JSON: {error}); {_AGAIN}") from error
    if not isinstance(header, dict):
        raise FNSFTError(f"{path} cannot be read (its header is no mapping); {_AGAIN}")
    metadata = header.pop("__metadata__", None)
    shapes = description.tensor_shapes()
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
    if metadata != {FORMAT: str(description.format_version)}:
        raise FNSFTError(f"{path} is not of format {FORMAT!r} in the version of its {CONFIG_FILE}; {_AGAIN}")
    if size != 8 + length + total:
        raise FNSFTError(f"{path} has {size} bytes, its header asks for {8 + length + total}; {_AGAIN}")
