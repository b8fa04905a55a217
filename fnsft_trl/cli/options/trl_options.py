"""The options of TRL's dataclasses, which `fnsft train` has.

Importing TRL's dataclasses takes many seconds, so what they say is kept as JSON in the user's cache, made once for
each set of installed versions. torch, transformers and trl are imported only if that file is missing, of other
versions, or damaged.
"""

import dataclasses
import hashlib
import json
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import __version__
from ...cache import cache_dir
from ...hub.credentials import TOKEN_HELP
from ...json_text import from_json
from ...training import numbers
from ...training.numbers import TRAINING_RANGES
from ...writing import written_whole
from . import schema
from .schema import TRL, Option, describe


_PACKAGES = ("trl", "transformers", "peft", "accelerate", "torch")
# Option -> the values that have a meaning, from and to.
_RANGES = TRAINING_RANGES | {"lora_r": (1, None), "lora_alpha": (1, None), "lora_dropout": (0, 0.999)}


def trl_options() -> list[Option]:
    """The options that TRL's dataclasses make."""
    versions = {"python": ".".join(map(str, sys.version_info[:2])), "fnsft_trl": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    # So that no file outlives a change of what it holds.
    source = b"".join(Path(module).read_bytes() for module in (__file__, schema.__file__, numbers.__file__))
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

    from ...compat.transformers import tracker_names

    options = [option for name in TRL for option in describe(getattr(trl, name))]
    trackers = (*tracker_names(), "all", "none")
    # What their types do not say.
    more = {name: {"lowest": lowest, "highest": highest} for name, (lowest, highest) in _RANGES.items()}
    more |= {"report_to": {"choices": trackers}, "resume_from_checkpoint": {"switch": True}}
    more["hub_token"] = {"help": f"The token to push with. {TOKEN_HELP}"}
    more["pad_to_multiple_of"] |= {"choices": ("auto",)}
    options = [dataclasses.replace(option, **more.get(option.name, {})) for option in options]
    _write(path, key, options)
    return options


def _digest(key: str, entries: list) -> str:
    return hashlib.sha256(f"{key}{json.dumps(entries)}".encode()).hexdigest()


def _read(path: Path, key: str) -> list[Option] | None:
    """The options in a file; `None` when it is missing or is not what was written for these versions."""
    try:
        data = from_json(path.read_text(encoding="utf-8"))
        if data["sha256"] != _digest(key, data["options"]):
            return None
        listed = ("choices", "aliases")
        return [Option(**entry | {name: tuple(entry[name]) for name in listed}) for entry in data["options"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, options: list[Option]) -> None:
    """Write the file; without a cache that can be written, do nothing."""
    entries = json.loads(json.dumps([dataclasses.asdict(option) for option in options]))
    with suppress(OSError), written_whole(path) as scratch:
        scratch.write_text(json.dumps({"sha256": _digest(key, entries), "options": entries}), encoding="utf-8")
