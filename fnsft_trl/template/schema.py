"""What the `config.json` of a template may say, checked value by value before any is used. No torch.

Nothing that it says is opened, run or trusted: names are only shown, and the sizes it names are compared with the
tensors' file before memory is taken for them.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import SITES, ThresholdRule
from ..errors import FNSFTError
from ..hub.names import UNKNOWN, is_model_name, is_source_name, is_text, source_names


FORMAT = "fnsft_trl.template"
FORMAT_VERSION = 4  # with directions of inputs
PLAIN_VERSION = 3  # of templates without any
PROBES = 16  # numbers for each layer by which weights are compared, see weights.py

_MOST = 2**24  # layers, neurons of a layer, networks
_DIGEST = "config_sha256"


def is_description(config: Any) -> bool:
    """Whether a `config.json` is that of a template, of any version, and not that of a model."""
    return isinstance(config, dict) and config.get("format") == FORMAT


def signed(config: dict[str, Any]) -> dict[str, Any]:
    """What a `config.json` says, with a SHA-256 of it that tells damage; spaces and the order of keys don't count."""
    content = {key: value for key, value in config.items() if key != _DIGEST}
    written = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, _DIGEST: hashlib.sha256(written.encode()).hexdigest()}


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """Check what a `config.json` holds, and bring an older version into the current form.

    Args:
        config: what was read.
        path: named in messages.

    Raises:
        FNSFTError: another format, a newer version, or a value that is missing or has no meaning.
    """
    if not is_description(config):
        raise FNSFTError(
            f"{path} does not describe a template of functional networks (no format {FORMAT!r}); give the directory "
            "of one"
        )
    version = config.get("format_version")
    if not _is_count(version) or version < 1:
        raise FNSFTError(f"{path} has format version {reprlib.repr(version)}; it must be 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FNSFTError(
            f"{path} has format version {version}, this package reads versions up to {FORMAT_VERSION}; upgrade "
            "fnsft-trl"
        )
    if version > 2 and _DIGEST in config and signed(config) != config:
        raise FNSFTError(
            f"{path} is not as it was written ({_DIGEST}); fetch or save the template again, or, where the change was "
            f"meant, take {_DIGEST} out of it"
        )
    if version == 1:
        config = {"license": None, "weights": None, "statistics": True, "tensors_sha256": None, "null": None, **config}
    config = {"fnsft_trl_version": UNKNOWN, "basis": {}, **config}
    is_name = is_source_name if version > 2 else is_text
    _check_values(config, path, is_name)
    for number, component in enumerate(config["components"]):
        if not _is_component(component, config["widths"], is_name):
            raise FNSFTError(
                f"{path}: components[{number}] is {reprlib.repr(component)}; it must have explained_variance, "
                "kurtosis, reliability and jaccard (numbers in their range or null), and neurons counted by layers"
            )
    return config if version > 2 else _named(config)


def _check_values(config: dict[str, Any], path: Path, is_name: Callable[[Any], bool]) -> None:
    """Check all values but the single networks."""

    def need(key: str, valid: Callable[[Any], bool], expected: str) -> None:
        value: Any = config
        for part in key.split("."):
            if part not in value:
                raise FNSFTError(f"{path} lacks {key}; save the template again")
            value = value[part]
        if not valid(value):
            raise FNSFTError(f"{path}: {key} is {reprlib.repr(value)}; it must be {expected}")

    need("fnsft_trl_version", is_text, "the version of the package that made it")
    need("base_model", is_model_name, "a model's id (org/name) or the name of its directory")
    need("revision", lambda v: v is None or is_text(v), "null or a commit")
    need("architecture", lambda v: is_text(v) and v.isidentifier(), "the name of a class")
    need("site", lambda v: v in SITES, f"one of: {', '.join(SITES)}")
    need("license", lambda v: v is None or is_text(v), "null or the id of a license")
    need("widths", _is_widths, "the number of neurons of every layer")
    need("statistics", lambda v: isinstance(v, bool), "true or false")
    need("tensors_sha256", lambda v: v is None or _is_sha256(v), "null or a SHA-256")
    need("settings", lambda v: isinstance(v, dict) and all(map(_is_setting, v.values())), "names with plain values")
    need("threshold", lambda v: v is None or _is_threshold(v), "null, or a rule with its value")
    need("calibration", lambda v: isinstance(v, dict), "a mapping")
    need("calibration.sources", lambda v: isinstance(v, list) and all(map(is_name, v)), "a list of names, no paths")
    need("calibration.tokens", _is_count, "a number of tokens")
    need("calibration.sha256", lambda v: v is None or _is_sha256(v), "null or a SHA-256")
    curve = config["calibration"].get("curve", [])
    if not (isinstance(curve, list) and all(map(_is_point, curve))):
        raise FNSFTError(f"{path}: calibration.curve must be a list of tokens and reliability")
    need("null", lambda v: v is None or _is_null(v), "null, or reliability and jaccard")
    need("weights", lambda v: v is None or _is_weights(v, config["widths"]), "null, or norm and probes of every layer")
    need("basis", lambda v: _is_basis(v, config["widths"]), "the numbers of directions of every layer, or no mapping")
    need("components", lambda v: isinstance(v, list) and 0 < len(v) <= _MOST, "a list of networks")


def _named(config: dict[str, Any]) -> dict[str, Any]:
    """A description of version 1 or 2, which named datasets by the paths they were read from, with their names."""
    sources = config["calibration"]["sources"]
    cleaned = source_names(sources)
    names = dict(zip(sources, cleaned, strict=True))
    components = [
        {**c, "recurrence": {names.get(source, *source_names([source])): f for source, f in c["recurrence"].items()}}
        if "recurrence" in c
        else c
        for c in config["components"]
    ]
    calibration = {**config["calibration"], "sources": cleaned}
    return {**config, "calibration": calibration, "components": components}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any, lowest: float = -math.inf, highest: float = math.inf) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and abs(value) < 1e300 and lowest <= value <= highest


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_layer(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,6}", key) is not None


def _is_widths(value: Any) -> bool:
    valid = isinstance(value, dict) and 0 < len(value) <= _MOST and all(map(_is_layer, value))
    return valid and all(_is_count(width) and 0 < width <= _MOST for width in value.values())


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or (value == "" or is_text(value))


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


def _has_numbers(value: Any, *names: str, lowest: float = -math.inf, highest: float = math.inf) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name), lowest, highest) for name in names)


def _has_shares(value: Any, *names: str, perhaps: str | None = None) -> bool:
    """Whether a mapping has numbers in [0, 1] under some names, and under another one if it has that."""
    if not isinstance(value, dict):
        return False
    names += (perhaps,) if perhaps in value else ()
    return _has_numbers(value, *names, lowest=0, highest=1.001)


def _is_point(value: Any) -> bool:
    return _has_shares(value, "reliability", perhaps="above_null") and _is_count(value.get("tokens"))


def _is_null(value: Any) -> bool:
    return _has_shares(value, "reliability", "jaccard", perhaps="highest")


def _is_recurrence(value: Any) -> bool:
    counted = _has_shares(value, "correlation", "iou") and _is_count(value.get("component"))
    return counted and isinstance(value.get("recurs"), bool)


def _is_basis(value: Any, widths: dict[str, int]) -> bool:
    """Whether it is empty, or has for every layer: directions of the neurons, of the MLP's input, and its width."""
    if value == {}:
        return True
    valid = isinstance(value, dict) and set(value) == set(widths)
    return valid and all(
        isinstance(v, list) and len(v) == 3 and all(_is_count(n) and 0 < n <= _MOST for n in v) for v in value.values()
    )


def _is_weights(value: Any, widths: dict[str, int]) -> bool:
    if (
        not isinstance(value, dict)
        or set(value) != set(widths)
        or not all(_has_numbers(v, "norm", lowest=0) for v in value.values())
    ):
        return False
    probes = [layer.get("probes") for layer in value.values()]
    return all(isinstance(p, list) and len(p) == PROBES and all(map(_is_number, p)) for p in probes)


def _is_component(value: Any, widths: dict[str, int], is_name: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict):
        return False
    ranges = {"explained_variance": (0, 1.001), "kurtosis": (), "reliability": (0, 1.001), "jaccard": (0, 1)}
    for name, limits in ranges.items():
        if name not in value or not (value[name] is None or _is_number(value[name], *limits)):
            return False
    if not (value.get("name") is None or is_text(value["name"])):
        return False
    layers, found = value.get("layers"), value.get("recurrence", {})
    if not isinstance(layers, dict) or not isinstance(found, dict) or not _is_count(value.get("neurons")):
        return False
    if not all(layer in widths and _is_count(count) and count <= widths[layer] for layer, count in layers.items()):
        return False
    found_in = all(is_name(name) and _is_recurrence(entry) for name, entry in found.items())
    return found_in and sum(layers.values()) == value["neurons"]
