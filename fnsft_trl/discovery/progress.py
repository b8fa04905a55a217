"""DiscoveryProgress: how far a discovery is, on disk, so that an interrupted one can go on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FNSFTError


_STATE = "state"


class DiscoveryProgress:
    """Saves and loads the sketches of a discovery; the newest complete save counts.

    Each save is a folder `batch-<number>` with one safetensors file for each process. A folder counts when every
    process has written its file, so a killed process leaves the save before.

    Args:
        directory: where the saves are.
        about: what the discovery is of; another one cannot be resumed from here.
        share: (i, n): this is process i of n.
    """

    def __init__(self, directory: str | os.PathLike, about: dict[str, Any], share: tuple[int, int]) -> None:
        self.directory = Path(directory)
        self.about = about
        self.index, self.count = share

    def save(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Save, then delete the save before.

        Args:
            tensors: what the sketches hold.
            state: `batch`, the number of the last batch; and whatever else JSON can hold.
        """
        folder = self.directory / f"batch-{state['batch']}"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".process-{self.index}.partial"
        save_file(tensors, scratch, metadata={_STATE: json.dumps({"about": self.about, **state})})
        os.replace(scratch, self._file(folder, self.index))
        if self.count > 1:
            dist.barrier()
        if self.index == 0:
            for older in self._saves()[:-1]:
                shutil.rmtree(older)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and the state of the newest complete save.

        Raises:
            FNSFTError: there is none, it cannot be read, or it is of a discovery with other settings.
        """
        saves = self._saves()
        if not saves:
            raise FNSFTError(f"there is no interrupted discovery in {self.directory} to resume; start without resume")
        file = self._file(saves[-1], self.index)
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                state = json.loads(opened.metadata()[_STATE])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FNSFTError(f"{file} cannot be read ({error}); delete it and start without resume") from error
        for key, value in self.about.items():
            if state["about"].get(key) != value:
                raise FNSFTError(
                    f"the interrupted discovery in {self.directory} has {key}={state['about'].get(key)!r}, this one "
                    f"{value!r}; give the same settings, or start again without resume"
                )
        return tensors, state

    def clear(self) -> None:
        """Delete all saves."""
        if self.count > 1:
            dist.barrier()
        if self.index == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, folder: Path, index: int) -> Path:
        return folder / f"process-{index}.safetensors"

    def _saves(self) -> list[Path]:
        """Complete saves, oldest first."""
        complete = [
            folder
            for folder in self.directory.glob("batch-*")
            if all(self._file(folder, index).is_file() for index in range(self.count))
        ]
        return sorted(complete, key=lambda folder: int(folder.name.removeprefix("batch-")))
