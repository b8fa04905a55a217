"""Directions on disk: `directions.json`, which says of what model and texts they are, and `directions.safetensors`."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import FNSFTError
from ..hub.files import MissingFileError, fetch_file, is_hub_id
from ..json_text import WRONG_VALUES, from_json
from ..writing import write_text_whole, written_whole
from .directions import InputDirections, KeptDirections


FORMAT = "fnsft_trl.directions"
PROTECTION_DIR = "protection"  # beside the weights of a run that protected them
ABOUT_FILE, TENSORS_FILE = "directions.json", "directions.safetensors"


def save_directions(kept: KeptDirections, directory: str | os.PathLike, about: dict[str, Any]) -> None:
    """Write directions into a directory, made if it does not exist, in float32.

    Args:
        kept: the directions.
        directory: where to.
        about: what is known of them, as JSON values.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for number, each in enumerate(kept.inputs):
        tensors[f"inputs.{number}.basis"] = each.basis.T.float().contiguous()  # (directions, width)
        tensors[f"inputs.{number}.mean"] = each.mean.float().contiguous()
    content = {
        "format": FORMAT,
        "format_version": 1,
        **about,
        "inputs": [
            {"modules": list(each.modules), "width": each.width, "directions": each.basis.shape[1]}
            for each in kept.inputs
        ],
    }
    with written_whole(directory / TENSORS_FILE) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    write_text_whole(directory / ABOUT_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def load_directions(directory: str | os.PathLike) -> tuple[KeptDirections, dict[str, Any]]:
    """Read directions.

    Args:
        directory: that they were saved in.

    Returns:
        The directions, and what is known of them.

    Raises:
        FNSFTError: there are none, or the files are damaged.
    """
    directory = Path(directory)
    try:
        about = from_json((directory / ABOUT_FILE).read_text(encoding="utf-8"))
        if about["format"] != FORMAT or about["format_version"] != 1:
            raise ValueError(f"format {about['format']!r}, version {about['format_version']!r}")
        tensors = load_file(directory / TENSORS_FILE)
        inputs = []
        for number, each in enumerate(about["inputs"]):
            basis, mean = tensors[f"inputs.{number}.basis"], tensors[f"inputs.{number}.mean"]
            if basis.shape != (each["directions"], each["width"]) or mean.shape != (each["width"],):
                raise ValueError(f"input {number} has {tuple(basis.shape)} instead of what {ABOUT_FILE} says")
            inputs.append(InputDirections(tuple(each["modules"]), basis.T.double().contiguous(), mean.double()))
    except (SafetensorError, OSError, *WRONG_VALUES) as error:
        told = " ".join(str(error).split())
        raise FNSFTError(
            f"{directory} holds no directions that can be read ({told}); find them again (fnsft discover "
            "--basis_only), or name another directory"
        ) from error
    return KeptDirections(tuple(inputs)), about


def find_directions(reference: str, *, revision: str | None = None) -> Path | None:
    """Where saved directions lie; `None` where there are none, but perhaps a template.

    Args:
        reference: their directory, that of a model trained with `protect`, or their id on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        FNSFTError: the Hub cannot be asked for them.
    """
    path = Path(os.path.expanduser(reference))
    if path.exists() or not is_hub_id(reference):
        places = (path, path / PROTECTION_DIR)
        return next((place for place in places if (place / ABOUT_FILE).is_file()), None)
    for folder in ("", f"{PROTECTION_DIR}/"):
        try:
            file = fetch_file(reference, folder + ABOUT_FILE, revision=revision)
        except MissingFileError:
            continue
        return fetch_file(reference, folder + TENSORS_FILE, revision=file.commit).path.parent
    return None


def rounded(kept: KeptDirections) -> KeptDirections:
    """Directions as they are after saving and loading."""
    return KeptDirections(
        tuple(
            InputDirections(each.modules, each.basis.float().double().contiguous(), each.mean.float().double())
            for each in kept.inputs
        ),
        kept.sinks,
    )


def bits(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's bits that is the same on every device."""
    words = tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).flatten()
    places = torch.arange(len(words), device=words.device) % 65521 + 1
    return int((words.long() * places).sum()) % 2**63
