"""Check in a fresh process that saved adapters reload: the same logits, bit for bit.

    python -m fnsft_trl.evaluation.reload MODEL FILE ADAPTER...

FILE is a safetensors file with `input_ids` and, for each adapter directory, the expected logits under its name.
Prints a JSON object: adapter name -> largest absolute difference.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..compat.accelerate import input_device
from ..errors import FNSFTError


_FILE = "reload_check.safetensors"


@torch.no_grad()
def last_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of each sequence, after its last token where every token has some; float32 on the CPU.

    Args:
        model: a language model, shape of the logits (sequences, vocabulary), or a classifier, (sequences, labels).
            The decoder of an encoder-decoder model reads the same tokens as its encoder.
        input_ids: shape (sequences, positions).
    """
    was_training = model.training
    model.eval()
    inputs = {"input_ids": input_ids.to(input_device(model))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    return (logits[:, -1] if logits.dim() == 3 else logits).float().cpu().contiguous()


def check_reload(
    model_path: str, adapters: Mapping[str, Path], input_ids: torch.Tensor, expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Load every adapter in one fresh process and compare its logits with the expected ones.

    Args:
        model_path: directory or id of the base model, which is read at the revision that an adapter names.
        adapters: name -> directory of a saved PEFT adapter; all in one parent directory.
        input_ids: shape (sequences, positions).
        expected: name -> logits as [`last_logits`] gave them.

    Returns:
        name -> largest absolute difference.

    Raises:
        FNSFTError: an adapter does not load.
    """
    file = next(iter(adapters.values())).parent / _FILE
    save_file({"input_ids": input_ids, **expected}, file)
    command = [sys.executable, "-m", __spec__.name, model_path, str(file)]
    done = subprocess.run(
        [*command, *(f"{name}={path}" for name, path in adapters.items())], capture_output=True, text=True, check=False
    )
    file.unlink()
    if done.returncode != 0:
        raise FNSFTError(f"a saved adapter does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _main(model_path: str, file: str, *adapters: str) -> None:
    from ..tuner.saved import SavedAdapter  # also adds neuron deltas to PEFT's tables

    tensors = load_file(file)
    differences = {}
    for adapter in adapters:
        name, _, path = adapter.partition("=")
        saved = SavedAdapter.read(path)
        model = saved.load_onto(saved.load_base(model_path, dtype=torch.float32))
        differences[name] = float((last_logits(model, tensors["input_ids"]) - tensors[name]).abs().max())
    sys.stdout.write(json.dumps(differences) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
