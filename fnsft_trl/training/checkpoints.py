"""Checkpoints: complete or not. A run marks one when all of it is written, and goes on from none that is damaged."""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..compat.transformers import TRAINER_STATE_FILE
from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json
from ..template.storage import NETWORK_DIR
from ..writing import written_whole


logger = logging.get_logger(__name__)

MARKER_FILE = "complete.json"  # in NETWORK_DIR

SCALER_FILE = "scaler.pt"  # of float16

_CARDS = (".md", ".svg")  # which people may edit
_BLOCK = 2**20
# What a training goes on from, and the names that it has, those of sharded weights among them.
_PARTS = {
    "weights": (
        *("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp*", "global_step*"),
        "*/adapter_model.safetensors",
    ),
    "state of the optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "state of the learning rate": ("scheduler.pt", "global_step*"),
    "state of random numbers": ("rng_state.pth", "rng_state_0.pth"),
}


def mark(directory: Path, about: dict[str, Any]) -> None:
    """Mark a checkpoint as complete: with the size and the checksum of each of its files, written last.

    Args:
        directory: of the checkpoint.
        about: what the run was asked to do, as JSON values; `marked` gives it back.
    """
    files = {name: [path.stat().st_size, _checksum(path)] for name, path in _files(directory)}
    record = {"files": files, "run": about}
    content = {"record": record, "crc32": _record_checksum(record)}
    (directory / NETWORK_DIR).mkdir(parents=True, exist_ok=True)
    with written_whole(directory / NETWORK_DIR / MARKER_FILE) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def marked(directory: Path) -> dict[str, Any] | None:
    """What the run of a complete checkpoint was asked to do; `None` where it has no mark."""
    record = _record(directory)
    return record and record.get("run")


def find_checkpoint(asked: str | bool | None, args: TrainingArguments, *, has_mark: bool) -> Path | None:
    """The checkpoint that a training is to go on from, each of its files read; the same in all processes.

    Args:
        asked: a directory, or true for the newest complete one in `args.output_dir`; what is newer is named in a
            warning.
        args: of the run.
        has_mark: whether the newest one must be marked as complete, as runs with networks do. One that is named may
            lack it, and is checked by the form of its files.

    Raises:
        FNSFTError: there is none, or it is not complete.
    """
    if asked is None or str(asked).lower() in ("false", ""):
        return None
    if not isinstance(asked, str | bool | os.PathLike):
        raise FNSFTError(
            f"resume_from_checkpoint is {asked!r}; expected the directory of a checkpoint, or true for the newest one"
        )
    found = ["", ""]
    if args.process_index == 0:
        try:
            found[0] = str(_find(asked, Path(args.output_dir), has_mark))
        except FNSFTError as error:  # which all processes must raise
            found[1] = str(error)
    if args.world_size > 1:
        broadcast_object_list(found)
    if found[1]:
        raise FNSFTError(found[1])
    return Path(found[0])


def _find(asked: str | bool, output_dir: Path, has_mark: bool) -> Path:
    if str(asked).lower() != "true":
        directory = Path(asked).expanduser()
        if not any(os.path.isfile(directory / name) for name in (TRAINER_STATE_FILE, f"{NETWORK_DIR}/{MARKER_FILE}")):
            raise FNSFTError(
                f"resume_from_checkpoint is {str(asked)!r}, which is no checkpoint of a training (it has no "
                f"{TRAINER_STATE_FILE}); give a directory such as OUTPUT_DIR/checkpoint-100, or true for the last one"
            )
        if reason := damage(directory):
            raise FNSFTError(
                f"{directory} cannot be resumed from: {reason}; name another checkpoint, or give true for the newest "
                "one that is complete"
            )
        return directory
    skipped = []
    for directory in _newest_first(output_dir):
        reason = damage(directory)
        if reason is None and has_mark and not (directory / NETWORK_DIR / MARKER_FILE).is_file():
            reason = "not marked as complete: its writing was interrupted, or an earlier version wrote it"
        if reason is None:
            if skipped:
                logger.warning(f"resuming from {directory}; not from what is newer: {'; '.join(skipped)}")
            return directory
        skipped.append(f"{directory.name} ({reason})")
    if skipped:
        raise FNSFTError(
            f"no checkpoint in {output_dir} is complete: {'; '.join(skipped)}; name one that is only not marked, or "
            "start anew (drop resume_from_checkpoint)"
        )
    raise FNSFTError(f"there is no checkpoint in {output_dir} to resume from; drop resume_from_checkpoint")


def newest_complete(output_dir: Path, *, has_mark: bool) -> Path | None:
    """The newest checkpoint that a training can go on from, if there is any."""
    for directory in _newest_first(output_dir):
        if damage(directory) is None and (not has_mark or (directory / NETWORK_DIR / MARKER_FILE).is_file()):
            return directory
    return None


def _newest_first(output_dir: Path) -> list[Path]:
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words, after reading all of it; `None` if it is complete.

    Args:
        directory: of the checkpoint. One without a mark is checked by the form of its files.
    """
    for part, names in _PARTS.items():
        if not any(any(directory.glob(name)) for name in names):
            return f"it holds no {part} ({names[0]})"
    try:
        record = _record(directory)
        for name, (size, checksum) in record["files"].items() if record else ():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} is damaged (CRC-32)"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    for name, path in () if record else _files(directory):
        if reason := _malformed(path):
            return f"{name} {reason}"
    try:
        TrainerState.load_from_json(str(directory / TRAINER_STATE_FILE))
    except (OSError, *WRONG_VALUES) as error:
        return f"{TRAINER_STATE_FILE} cannot be read ({error})"
    return None


def _record(directory: Path) -> dict[str, Any] | None:
    """What stands in the mark.

    Raises:
        ValueError, OSError: it is damaged.
    """
    path = directory / NETWORK_DIR / MARKER_FILE
    if not path.is_file():
        return None
    try:
        content = dict(from_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{NETWORK_DIR}/{MARKER_FILE}: {error}") from error
    record = content.get("record")
    if content.get("crc32") != _record_checksum(record):
        raise ValueError(f"{NETWORK_DIR}/{MARKER_FILE} is damaged (CRC-32)")
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not all(isinstance(each, list) and len(each) == 2 for each in files.values()):
        raise ValueError(f"{NETWORK_DIR}/{MARKER_FILE} does not say which files there are")
    return record


def _record_checksum(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files that a training may go on from, by their names within the checkpoint."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and path.suffix not in _CARDS and name != f"{NETWORK_DIR}/{MARKER_FILE}":
            yield name, path


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _malformed(path: Path) -> str | None:
    """What is wrong with the form of a file, by its kind."""
    size = path.stat().st_size
    try:
        if path.suffix == ".json":
            content = from_json(path.read_text(encoding="utf-8"))
            if path.name.endswith(".index.json"):  # of weights in several files
                lost = [name for name in content["weight_map"].values() if not (path.parent / name).is_file()]
                return f"names {lost[0]}, which is missing" if lost else None
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                tensors = dict(from_json(file.read(min(length, size))))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
            return f"has {size} bytes instead of {expected}" if size != expected else None
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as file:
                return "is damaged (CRC-32)" if file.testzip() is not None else None
    except (*WRONG_VALUES, OSError, zipfile.BadZipFile, zlib.error) as error:
        return f"cannot be read ({error})"
    return None if size else "is empty"
