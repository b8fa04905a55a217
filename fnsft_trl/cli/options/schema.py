"""The options of `fnsft train`: names, types, choices, defaults and help of TRL's dataclasses and ours.

Importing TRL's dataclasses takes many seconds, so what they say is kept as JSON in the user's cache, made once for
each set of installed versions. Ours are read as they are. torch, transformers and trl are imported only if that file
is missing, of other versions, or damaged.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ... import __version__
from ...config import FunctionalNetworkConfig
from ...data.config import DataConfig
from ...embedded import cache_dir
from .run_config import RunConfig


# Ours, which are cheap to import. The order is that of the help.
OURS = (FunctionalNetworkConfig, DataConfig, RunConfig)
# The dataclasses of TRL, by name.
TRL = ("ScriptArguments", "DatasetMixtureConfig", "ModelConfig", "SFTConfig")

_PACKAGES = ("trl", "transformers", "peft", "accelerate", "torch")
_PLAIN = {bool: "bool", int: "int", float: "float", str: "str", dict: "mapping"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of `fnsft train`.

    Attributes:
        name (`str`): as on the command line and in YAML.
        group (`str`): name of the dataclass that it is a field of.
        kind (`str`): of its value or, with `many`, of each of them: `bool`, `int`, `float`, `str`, `mapping` or
            `datasets` (the mappings of a mixture).
        many (`bool`): whether it takes a list.
        text (`bool`): whether it takes a plain string too.
        switch (`bool`): whether it takes true and false, or nothing, too.
        nullable (`bool`): whether it takes null.
        choices (`tuple[str, ...]`): the values it can have (`datasets`: the keys); empty if there is no such list.
        default: as JSON.
        help (`str`): one paragraph.
    """

    name: str
    group: str
    kind: str
    many: bool = False
    text: bool = False
    switch: bool = False
    nullable: bool = False
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""


def training_options() -> dict[str, Option]:
    """All options of `fnsft train`, by name, ours first."""
    found = [option for kind in OURS for option in describe(kind)]
    return {option.name: option for option in found + _trl_options()}


def describe(dataclass: type) -> list[Option]:
    """The options that the fields of a dataclass make; a field that no text can express makes none."""
    hints = get_type_hints(dataclass)
    options = []
    for field in dataclasses.fields(dataclass):
        form = _form(hints[field.name])
        if not field.init or form is None:
            continue
        if field.metadata.get("const") is True:
            form["switch"] = True
        if choices := field.metadata.get("choices"):
            form["choices"] = tuple(map(str, choices))
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = None if default is dataclasses.MISSING else default
        default = default.value if isinstance(default, Enum) else default
        text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        options.append(Option(field.name, dataclass.__name__, default=default, help=text, **form))
    return options


def _form(hint: Any) -> dict[str, Any] | None:
    """What a type hint says of an option's values; `None` for types that no text can express."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    form: dict[str, Any] = {"nullable": NoneType in parts, "text": str in parts}
    kinds = set()
    for part in parts:
        origin = get_origin(part) or part
        if origin is NoneType:
            continue
        if origin is list:
            (item,) = get_args(part) or (str,)
            form["many"] = True
            kinds.add("datasets" if dataclasses.is_dataclass(item) else _PLAIN.get(item, "str"))
            if dataclasses.is_dataclass(item):
                form["choices"] = tuple(field.name for field in dataclasses.fields(item))
        elif origin is Literal:
            kinds.add("bool" if set(get_args(part)) <= {True, False} else "str")
            form["choices"] = tuple(map(str, get_args(part)))
        elif isinstance(part, type) and issubclass(part, Enum):
            kinds.add("str")
            form["choices"] = tuple(str(member.value) for member in part)
        elif origin in _PLAIN:
            kinds.add(_PLAIN[origin])
        else:
            return None
    if len(kinds) > 1:
        form["switch"] = "bool" in kinds
        if "bool" in kinds:
            form.pop("choices", None)
    # Of several kinds, the one that says most: `int | str` is an int or any other text.
    form["kind"] = next(kind for kind in ("datasets", "mapping", "int", "float", "str", "bool") if kind in kinds)
    return form


def _trl_options() -> list[Option]:
    versions = {"python": ".".join(map(str, sys.version_info[:2])), "fnsft_trl": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    source = Path(__file__).read_bytes()  # so that no file outlives a change of what it holds
    key = hashlib.sha256(source + json.dumps(versions, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / f"options-{key[:16]}.json"
    stored = _read(path, key)
    if stored is not None:
        return stored
    print(
        f"fnsft train: reading the options of TRL {versions['trl']}, once for this version (some seconds)",
        file=sys.stderr,
    )
    import trl
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    options = [option for name in TRL for option in describe(getattr(trl, name))]
    trackers = (*sorted(INTEGRATION_TO_CALLBACK), "all", "none")
    # What their types do not say.
    more = {"report_to": {"choices": trackers}, "resume_from_checkpoint": {"switch": True}}
    options = [dataclasses.replace(option, **more.get(option.name, {})) for option in options]
    _write(path, key, options)
    return options


def _digest(key: str, entries: list) -> str:
    return hashlib.sha256(f"{key}{json.dumps(entries)}".encode()).hexdigest()


def _read(path: Path, key: str) -> list[Option] | None:
    """The options in a file; `None` when it is missing or is not what was written for these versions."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["sha256"] != _digest(key, data["options"]):
            return None
        return [Option(**{**entry, "choices": tuple(entry["choices"])}) for entry in data["options"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, options: list[Option]) -> None:
    """Write the file beside its place and rename it; without a cache that can be written, do nothing."""
    entries = json.loads(json.dumps([dataclasses.asdict(option) for option in options]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=".options-", dir=path.parent)
    except OSError:
        return
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"sha256": _digest(key, entries), "options": entries}, file)
        os.replace(scratch, path)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
