"""DiscoveryProgress: how far a discovery is, on disk, so that an interrupted one can go on."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json
from ..writing import written_whole


logger = logging.get_logger(__name__)

WEIGHTS = "weights"  # in what a discovery is about: the SHA-256 of its model's weights

_STATE, _DIGEST = "state", "sha256"
_SAVES = 10  # times that a discovery is saved on its way,
_LEAST_SAVED = 4096  # tokens; less is not worth it


def _digest(state: str, tensors: dict[str, torch.Tensor]) -> str:
    """Of all that a save holds."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Stateful(Protocol):
    """What is saved: anything whose whole state is tensors."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on later."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the state of another one of its kind."""


class Milestones:
    """Marks on a growing count, each passed once.

    Where they are does not depend on how often one looks, so an interrupted discovery that goes on passes the same.

    Args:
        first: the first of them.
        following: from each to the next.
    """

    def __init__(self, first: float, following: Callable[[float], float]) -> None:
        self._next = first
        self._following = following

    def passed(self, count: int) -> bool:
        """Whether the count has passed one since the last look."""
        if count < self._next:
            return False
        while self._next <= count:
            self._next = self._following(self._next)
        return True


class DiscoveryProgress:
    """Saves and loads the parts of a discovery; the newest complete save counts.

    Each save is a folder `batch-<number>` with one safetensors file for each process. A folder counts when every
    process has written its file, so a killed process leaves the save before.

    Args:
        directory: where the saves are; `None`: nothing is saved.
        about: what the discovery is of; another one cannot be resumed from here.
        share: (i, n): this is process i of n.
        max_tokens: that the discovery will read; it is saved ten times on the way, by each process.
        meet: waits for all processes; a barrier by default.

    Attributes:
        first_batch (`int`): number of the first batch that was not read before the interruption.
        marks (`Milestones`): the numbers of tokens at which to save.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        about: dict[str, Any],
        share: tuple[int, int],
        *,
        max_tokens: int,
        meet: Callable[[], None] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.about = about
        self.index, self.count = share
        self.first_batch = 0
        every = max(max_tokens / _SAVES, _LEAST_SAVED)
        self.marks = Milestones(every, lambda mark: mark + every)
        self._meet = meet or dist.barrier
        self._sha256: str | None = None  # of the tokens read before the interruption

    def save(self, parts: Sequence[Stateful], *, batch: int, sha256: str, **notes: Any) -> None:
        """Save, then delete the saves before. Where the disk does not take it, warn and keep these.

        Args:
            parts: whose state is saved.
            batch: number of the last batch that they hold.
            sha256: of the tokens read so far.
            notes: whatever else [`resume`] shall give; plain JSON values.
        """
        if self.directory is None:
            return
        folder = self.directory / f"batch-{batch}"
        tensors = {f"{number}.{name}": t for number, part in enumerate(parts) for name, t in part.state_dict().items()}
        state = json.dumps({"about": self.about, "batch": batch, "sha256": sha256, "notes": notes})
        try:
            with written_whole(self._file(folder, self.index)) as scratch:
                save_file(tensors, scratch, metadata={_STATE: state, _DIGEST: _digest(state, tensors)})
        except (OSError, SafetensorError) as error:  # the discovery itself needs no disk
            self._file(folder, self.index).unlink(missing_ok=True)  # of another discovery, with the same number
            logger.warning(
                f"the discovery could not be saved after batch {batch} ({error}), and goes on; if it is interrupted "
                "now, it starts again from the save before, if there is one"
            )
        if self.count > 1:
            self._meet()
        if self.index == 0 and self._is_complete(folder):
            _remove(other for other in _folders(self.directory) if other != folder)

    def resume(self, parts: Sequence[Stateful]) -> dict[str, Any]:
        """Bring the parts to where the newest complete save has them.

        Call [`check_texts`] when the batches before `first_batch` are counted again.

        Returns:
            The notes that were saved.

        Raises:
            FNSFTError: there is no save, it cannot be read, or it is of a discovery with other settings or weights.
        """
        if self.directory is None:
            raise FNSFTError(
                "there is nothing to resume from without a progress_dir; give the one of the interrupted discovery"
            )
        saves = self._saves()
        if not saves:
            raise FNSFTError(f"there is no interrupted discovery in {self.directory} to resume; start without resume")
        file = self._file(saves[-1], self.index)
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                written = opened.metadata()[_STATE]
                if opened.metadata()[_DIGEST] != _digest(written, tensors):
                    raise ValueError("it is not as it was written")
                state = from_json(written)
                state["about"] = dict(state["about"])
        except (SafetensorError, OSError, *WRONG_VALUES) as error:
            raise FNSFTError(f"{file} cannot be read ({error}); delete it and start without resume") from error
        for key, value in self.about.items():
            if state["about"].get(key) != value:
                if key == WEIGHTS:
                    raise FNSFTError(
                        f"the weights of the model are not those of the interrupted discovery in {self.directory} "
                        "(another revision of it, or it was trained meanwhile); load the same ones, or start again "
                        "without resume"
                    )
                raise FNSFTError(
                    f"the interrupted discovery in {self.directory} has {key}={state['about'].get(key)!r}, this one "
                    f"{value!r}; give the same settings, or start again without resume"
                )
        expected = {f"{number}.{name}" for number, part in enumerate(parts) for name in part.state_dict()}
        if set(tensors) != expected:
            raise FNSFTError(f"{file} was saved by another version of fnsft-trl; start without resume")
        for number, part in enumerate(parts):
            part.load_state_dict({name: tensors[f"{number}.{name}"] for name in part.state_dict()})
        self.first_batch, self._sha256 = state["batch"] + 1, state["sha256"]
        return state["notes"]

    def check_texts(self, sha256: str) -> None:
        """Check that the tokens before `first_batch` are those that were read before the interruption.

        Raises:
            FNSFTError: they are others.
        """
        if sha256 != self._sha256:
            raise FNSFTError(
                f"the texts differ from those of the interrupted discovery in {self.directory}; give the same ones, "
                "or start again without resume"
            )

    def _file(self, folder: Path, index: int) -> Path:
        return folder / f"process-{index}.safetensors"

    def _is_complete(self, folder: Path) -> bool:
        return all(self._file(folder, index).is_file() for index in range(self.count))

    def _saves(self) -> list[Path]:
        """Complete saves, oldest first."""
        return [folder for folder in _folders(self.directory) if self._is_complete(folder)]


def clear_progress(directory: str | os.PathLike) -> None:
    """Delete the saves of discoveries from a directory, and nothing else in it: once the template is saved.

    Args:
        directory: the `progress_dir` of [`~fnsft_trl.discovery.discovery.discover_networks`].
    """
    _remove(_folders(Path(directory)))


def _folders(directory: Path) -> list[Path]:
    """The folders of saves, complete or not, by their numbers."""
    found = {}
    for path in directory.glob("batch-*"):
        if path.is_dir() and (match := re.fullmatch(r"batch-(\d+)", path.name)):
            found[int(match[1])] = path
    return [found[number] for number in sorted(found)]


def _remove(folders: Iterable[Path]) -> None:
    """Remove folders of saves, but for what no discovery has written into them."""
    for folder in folders:
        with suppress(OSError):
            for path in folder.iterdir():
                if re.fullmatch(r"process-\d+\.safetensors", path.name):
                    path.unlink()
                elif re.fullmatch(r"\.process-\d+\.safetensors\..*", path.name):  # of a killed process
                    shutil.rmtree(path)
            folder.rmdir()
