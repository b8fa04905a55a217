"""Weights that are computed one by one and kept in files, so that what a merge changes takes no memory of its own."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..compat.peft import BaseTunerLayer
from ..errors import FNSFTError


def move_to_disk(parameter: nn.Parameter, folder: Path) -> torch.Tensor:
    """Let a parameter on the CPU keep its values in a file of a folder; what is written to it goes there.

    Args:
        parameter: changed in place. One that is empty or elsewhere (an accelerator, offloaded) stays as it is.
        folder: on the disk that has the room. It may be deleted while the parameter is used.

    Returns:
        The tensor that it has now.

    Raises:
        OSError: the disk does not take it.
    """
    values = parameter.data
    if values.device.type == "cpu" and values.numel():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            if sys.platform == "linux":  # a full disk is an error here, and the end of the process once it is mapped
                os.posix_fallocate(file.fileno(), 0, values.nbytes)
        kept = torch.from_file(file.name, shared=True, size=values.numel(), dtype=values.dtype).view(values.shape)
        parameter.data = kept.copy_(values)
    return parameter.data


def merge_on_disk(model: PeftModel, folder: Path) -> nn.Module:
    """`merge_and_unload`, weight by weight: beside the base model, memory holds one merged weight at a time.

    The base model is read from its files as it is used (`safetensors` maps them), and a merged weight is written to
    a file at once.

    Args:
        model: with the adapter. It cannot be used afterwards.
        folder: for the merged weights; see [`move_to_disk`].

    Returns:
        The base model with merged weights.

    Raises:
        FNSFTError: a merged weight is not finite.
    """
    files: dict[nn.Parameter, torch.Tensor] = {}
    for layer in tqdm([each for each in model.modules() if isinstance(each, BaseTunerLayer)], desc="merging"):
        parameters = list(layer.get_base_layer().parameters(recurse=False))
        if any(parameter.is_meta for parameter in parameters):  # offloaded: PEFT fetches and merges it below
            continue
        files |= {each: move_to_disk(each, folder) for each in parameters if each not in files}
        with _told():
            layer.merge(safe_merge=True)
        for parameter in parameters:
            if parameter.data_ptr() != files[parameter].data_ptr():
                parameter.data = files[parameter].copy_(parameter.data)
    with warnings.catch_warnings(), _told():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return model.merge_and_unload(safe_merge=True)


@contextmanager
def _told() -> Iterator[None]:
    """Say in the words of this package what PEFT refuses to merge."""
    try:
        yield
    except FNSFTError:
        raise
    except ValueError as error:
        raise FNSFTError(
            f"the adapter does not merge: {error}; train it again, or take an earlier checkpoint"
        ) from error
