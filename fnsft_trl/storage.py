"""A template on disk: the form of its files, written whole and checked before use. No torch until tensors are read.

Nothing that a file says is opened, run or trusted: names are only shown, sizes are compared with the file's before
memory is taken, and tensors must be those that the description asks for.
"""

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ThresholdRule
from .errors import FNSFTError


if TYPE_CHECKING:
    import torch

FORMAT = "fnsft_trl.template"
FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
TENSOR_FILE = "template.safetensors"
CARD_FILE = "README.md"
FIGURE_FILE = "networks.svg"
FILES = (TENSOR_FILE, CARD_FILE, FIGURE_FILE, CONFIG_FILE)
SITES = ("mlp_intermediate", "mlp_output")
UNKNOWN = "unknown"  # base model and architecture of a template that does not say

_READY = ".template.ready"  # while it exists, a newer template waits beside the old one
_LARGEST_DESCRIPTION = 64 * 2**20  # bytes of config.json and of the tensors' header
_MOST = 2**24  # layers, neurons of a layer, networks
_STATISTICS = ("mean", "rms")
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
        FNSFTError: it is no JSON, or too large.
    """
    if path.stat().st_size > _LARGEST_DESCRIPTION:
        raise FNSFTError(f"{path} has {path.stat().st_size} bytes, too many for the description of a template")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FNSFTError(f"{path} is not valid JSON ({error}); save the template again, or fetch it again") from error


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """Check what a `config.json` holds, and bring an older version into the current form.

    Args:
        config: what was read.
        path: named in messages.

    Raises:
        FNSFTError: another format, a newer version, or a value that is missing or has no meaning.
    """
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FNSFTError(f"{path} does not describe a template of functional networks (no format {FORMAT!r})")
    version = config.get("format_version")
    if not _is_count(version) or version < 1:
        raise FNSFTError(f"{path} has format version {reprlib.repr(version)}; it must be 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FNSFTError(
            f"{path} has format version {version}, this package reads versions up to {FORMAT_VERSION}; upgrade "
            "fnsft-trl"
        )
    if version == 1:
        config = {"license": None, "weights": None, "statistics": True, "tensors_sha256": None, "null": None, **config}

    def need(key: str, valid: Callable[[Any], bool], expected: str) -> None:
        value: Any = config
        for part in key.split("."):
            if part not in value:
                raise FNSFTError(f"{path} lacks {key}; save the template again")
            value = value[part]
        if not valid(value):
            raise FNSFTError(f"{path}: {key} is {reprlib.repr(value)}; it must be {expected}")

    need("base_model", _is_model_name, "a model's id (org/name) or the name of its directory")
    need("revision", lambda v: v is None or _is_text(v), "null or a commit")
    need("architecture", _is_text, "the name of a class")
    need("site", lambda v: v in SITES, f"one of: {', '.join(SITES)}")
    need("license", lambda v: v is None or _is_text(v), "null or the id of a license")
    need("widths", _is_widths, "the number of neurons of every layer")
    need("statistics", lambda v: isinstance(v, bool), "true or false")
    need("tensors_sha256", lambda v: v is None or _is_sha256(v), "null or a SHA-256")
    need("settings", lambda v: isinstance(v, dict) and all(map(_is_setting, v.values())), "names with plain values")
    need("threshold", lambda v: v is None or _is_threshold(v), "null, or a rule with its value")
    need("calibration", lambda v: isinstance(v, dict), "a mapping")
    need("calibration.sources", lambda v: isinstance(v, list) and all(map(_is_text, v)), "a list of names")
    need("calibration.tokens", _is_count, "a number of tokens")
    need("calibration.sha256", lambda v: v is None or _is_sha256(v), "null or a SHA-256")
    curve = config["calibration"].get("curve", [])
    if not (isinstance(curve, list) and all(_has_numbers(point, "tokens", "reliability") for point in curve)):
        raise FNSFTError(f"{path}: calibration.curve must be a list of tokens and reliability")
    need("null", lambda v: v is None or _has_numbers(v, "reliability", "jaccard"), "null, or reliability and jaccard")
    need("weights", lambda v: v is None or _is_weights(v), "null, or norm and probes of every layer")
    need("components", lambda v: isinstance(v, list) and 0 < len(v) <= _MOST, "a list of networks")
    for number, component in enumerate(config["components"]):
        if not _is_component(component, config["widths"]):
            raise FNSFTError(
                f"{path}: components[{number}] is {reprlib.repr(component)}; it must have explained_variance, "
                "kurtosis, reliability and jaccard (numbers in their range or null), and neurons counted by layers"
            )
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any, lowest: float = -math.inf, highest: float = math.inf) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and abs(value) < 1e300 and lowest <= value <= highest


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def _is_model_name(value: Any) -> bool:
    """A name that stays a name wherever it is shown: no absolute path, no way up, no address."""
    if value == "":  # a model made in memory
        return True
    is_name = _is_text(value) and not re.search(r"[\\:<>|`\[\](){}]", value) and value.count("/") <= 1
    return is_name and all(part.strip(". ") for part in value.split("/"))


def clean_model_name(name: str) -> str:
    """A model's name as `config.json` may hold it: its last parts, other characters replaced."""
    if _is_model_name(name):
        return name
    cleaned = re.sub(r"[^\w. -]", "-", name.strip("/").split("/")[-1])[:200]
    return cleaned if _is_model_name(cleaned) else UNKNOWN


def clean_text(text: str) -> str:
    """A name of a dataset as `config.json` may hold it: on one line, not too long."""
    return "".join(char if char.isprintable() else " " for char in text)[:500].strip() or UNKNOWN


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_layer(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,6}", key) is not None


def _is_widths(value: Any) -> bool:
    valid = isinstance(value, dict) and 0 < len(value) <= _MOST and all(map(_is_layer, value))
    return valid and all(_is_count(width) and 0 < width <= _MOST for width in value.values())


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or (value == "" or _is_text(value))


def _is_threshold(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"rule", "value"}:
        return False
    if not isinstance(value["rule"], str) or not _is_number(value["value"]):
        return False
    try:
        ThresholdRule(**value)
    except FNSFTError:
        return False
    return True


def _has_numbers(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


def _is_weights(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_is_layer, value)):
        return False
    return all(
        _has_numbers(layer, "norm") and isinstance(layer.get("probes"), list) and all(map(_is_number, layer["probes"]))
        for layer in value.values()
    )


def _is_component(value: Any, widths: dict[str, int]) -> bool:
    if not isinstance(value, dict):
        return False
    ranges = {"explained_variance": (0, 1.001), "kurtosis": (), "reliability": (0, 1.001), "jaccard": (0, 1)}
    for name, limits in ranges.items():
        if name not in value or not (value[name] is None or _is_number(value[name], *limits)):
            return False
    layers, found = value.get("layers"), value.get("recurrence", {})
    if not isinstance(layers, dict) or not isinstance(found, dict) or not _is_count(value.get("neurons")):
        return False
    if not all(layer in widths and _is_count(count) and count <= widths[layer] for layer, count in layers.items()):
        return False
    numbers = ("component", "correlation", "iou")
    found_in = all(_is_text(n) and _has_numbers(f, *numbers) and "recurs" in f for n, f in found.items())
    return found_in and sum(layers.values()) == value["neurons"]


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a description asks for."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, width in config["widths"].items():
        shapes[f"layers.{layer}.loadings"] = (len(config["components"]), width)
        if config["statistics"]:
            shapes |= {f"layers.{layer}.{part}": (width,) for part in _STATISTICS}
    return shapes


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
        raise FNSFTError(f"{path} cannot be read ({error.strerror}); save the template again") from error
    expected = config["tensors_sha256"]
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise FNSFTError(f"{path} is not the file that {CONFIG_FILE} describes (SHA-256); fetch or save it again")

    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise FNSFTError(f"{path} cannot be read ({error}); fetch or save the template again") from error
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
    again = "fetch or save the template again"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _LARGEST_DESCRIPTION:
            raise FNSFTError(f"{path} cannot be read (its header does not fit into {size} bytes); {again}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise FNSFTError(f"{path} cannot be read (its header is no JSON: {error}); {again}") from error
    if not isinstance(header, dict):
        raise FNSFTError(f"{path} cannot be read (its header is no mapping); {again}")
    metadata = header.pop("__metadata__", None)
    shapes = tensor_shapes(config)
    total = 0
    for name, shape in shapes.items():
        entry = header.pop(name, None)
        if not isinstance(entry, dict) or entry.get("shape") != list(shape):
            found = "nothing" if not isinstance(entry, dict) else f"shape {reprlib.repr(entry.get('shape'))}"
            raise FNSFTError(f"{path}: {name} should have shape {shape}, found {found}; {again}")
        if entry.get("dtype") not in _ITEM_SIZE:
            raise FNSFTError(f"{path}: {name} is {reprlib.repr(entry.get('dtype'))}; it must be F32 or F64; {again}")
        total += math.prod(shape) * _ITEM_SIZE[entry["dtype"]]
    if header:
        raise FNSFTError(f"{path} holds {reprlib.repr(min(header))}, which is no tensor of this template; {again}")
    if metadata != {FORMAT: str(config["format_version"])}:
        raise FNSFTError(f"{path} is not of format {FORMAT!r} in the version of its {CONFIG_FILE}; {again}")
    if size != 8 + length + total:
        raise FNSFTError(f"{path} has {size} bytes, its header asks for {8 + length + total}; {again}")


def describe_threshold(threshold: ThresholdRule | None) -> str:
    """The rule by which neurons belong to a network, in words."""
    return "the neurons listed for each network" if threshold is None else str(threshold)


def dump_config(config: dict[str, Any]) -> bytes:
    """The bytes of `config.json`."""
    threshold = config["threshold"]
    threshold = asdict(threshold) if isinstance(threshold, ThresholdRule) else threshold
    return (json.dumps({**config, "threshold": threshold}, indent=2, allow_nan=False) + "\n").encode()
