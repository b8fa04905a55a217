"""add_parts: the adapter and a GGUF file beside an exported model, so that one directory, and one card, holds all."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ..hub.card import with_section
from ..template.storage import CARD_FILE, NETWORK_DIR
from ..tuner import NeuronTunerConfig
from ..tuner.saved import SavedAdapter
from ..writing import disk_errors, files_written_whole
from .gguf import to_gguf
from .whole import ADAPTER_DIR, GGUF_FILE


# What belongs to an adapter, of all that a run leaves beside it.
_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def add_parts(
    directory: str | os.PathLike,
    source_dir: str | os.PathLike,
    parts: Collection[str],
    *,
    outtype: str = "auto",
    converter: str | None = None,
) -> None:
    """Put more of what was trained beside an exported model, and a section on all of it into its card.

    Args:
        directory: of the exported model.
        source_dir: what it was exported from.
        parts: `adapter` (into `adapter/`), `gguf` (the exported model, as `model.gguf`).
        outtype, converter: see [`~fnsft_trl.export.gguf.to_gguf`].

    Raises:
        FNSFTError: the converter is missing or fails.
    """
    directory, source = Path(directory), Path(source_dir)
    card = (directory / CARD_FILE).read_text(encoding="utf-8")
    with disk_errors(directory), files_written_whole(directory) as scratch:
        rows = ["| the model | `AutoModelForCausalLM.from_pretrained` of transformers, vLLM |"]
        if "adapter" in parts:
            (scratch / ADAPTER_DIR).mkdir()
            for name in _OF_ADAPTER:
                if (source / name).is_file():
                    shutil.copyfile(source / name, scratch / ADAPTER_DIR / name)
            before = ""
            if isinstance(SavedAdapter.read(source).config, NeuronTunerConfig):
                before = "`import fnsft_trl.tuner`, then "
            rows.append(f'| `{ADAPTER_DIR}/` | {before}`PeftModel.from_pretrained(..., subfolder="{ADAPTER_DIR}")` |')
        if (directory / NETWORK_DIR).is_dir():
            rows.append(f"| `{NETWORK_DIR}/` | `FunctionalNetworkTemplate.from_pretrained`, `fnsft inspect` |")
        if "gguf" in parts:
            to_gguf(directory, scratch / GGUF_FILE, outtype=outtype, converter=converter)
            rows.append(f"| `{GGUF_FILE}` | llama.cpp: `llama-cli -m {GGUF_FILE}` |")
        table = "\n".join(["| what | load it with |", "|---|---|", *rows])
        told = with_section(card, f"## What is here\n\n{table}")
        (scratch / CARD_FILE).write_text(told, encoding="utf-8")
