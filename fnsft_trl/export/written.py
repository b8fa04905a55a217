"""written_model: a whole model on its way to the disk, with its tokenizer, card and networks."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat.transformers import align_special_tokens
from ..errors import FNSFTError
from ..hub.card import MASK_NOTE, with_section
from ..occupied import EXPORTED_MODEL, check_target, write_export_mark
from ..template.storage import CARD_FILE, NETWORK_DIR
from ..writing import disk_errors, files_written_whole
from .on_disk import merge_on_disk
from .whole import ADAPTER_DIR, GGUF_FILE, WholeSource


# Of an older export.
_OWNED = ("model*.safetensors", "model*.safetensors.index.json", NETWORK_DIR, ADAPTER_DIR, GGUF_FILE)
_SHARD_SIZE = "5GB"
# Task type of an adapter -> what the Hub calls it.
_PIPELINES = {
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclass
class Written:
    """A whole model on its way to the disk.

    Attributes:
        model (`PreTrainedModel`): which may still be changed.
        card (`str`): its README.
        folder (`Path`): where it goes.
        weights (`Path`): a folder for weights that are computed; see [`~fnsft_trl.export.on_disk.move_to_disk`].
        has_networks (`bool`): whether the networks of the source, if it has any, are still those of the model.
    """

    model: PreTrainedModel
    card: str
    folder: Path
    weights: Path
    has_networks: bool = True

    def note(self, heading: str, text: str) -> None:
        """Say in the card what was done to the weights; a mask that is in them is no longer said not to be."""
        self.card = with_section(self.card.replace(MASK_NOTE, ""), f"## {heading}\n\n{text}")


@contextmanager
def written_model(
    source: WholeSource, output_dir: str | os.PathLike, form: str, *, dtype: str, loading: dict[str, Any]
) -> Iterator[Written]:
    """Write a source as a whole model, with its tokenizer, card and networks, as the body has changed it.

    All that may be refused is refused before the body and before anything is written.

    Args:
        source: what is written.
        output_dir: where to.
        form: what the export is called.
        dtype, loading: as for [`WholeSource.load`].

    Yields:
        The model in memory.
    """
    check_target(output_dir, EXPORTED_MODEL, sources=source.places)
    source.check_base(loading)
    processor = source.load_processor(**loading)
    model = source.load(dtype=dtype, **loading)
    tokenizer = getattr(processor, "tokenizer", processor)
    source.check_tokens(tokenizer, model, loading)
    with disk_errors(output_dir), files_written_whole(output_dir, owned=_OWNED, exchanged=True) as scratch:
        weights = scratch / ".weights"
        weights.mkdir()
        if isinstance(model, PeftModel):
            model = merge_on_disk(model, weights)
            _part_tied(model)
        align_special_tokens(model, tokenizer)
        _align_whole(model.config)
        written = Written(model, source.card(_pipeline(source, model)), scratch, weights)
        yield written
        model.save_pretrained(scratch, max_shard_size=_SHARD_SIZE)
        shutil.rmtree(weights)
        processor.save_pretrained(scratch)
        networks = source.directory / NETWORK_DIR
        if written.has_networks and networks.is_dir():
            shutil.copytree(networks, scratch / NETWORK_DIR)
        (scratch / CARD_FILE).write_text(written.card, encoding="utf-8")
        write_export_mark(scratch, form)


def _pipeline(source: WholeSource, model: PreTrainedModel) -> str | None:
    task = None if source.adapter is None else source.adapter.config.task_type
    return _PIPELINES.get(task, "text-generation" if model.can_generate() else None)


def _align_whole(config: PretrainedConfig) -> None:
    """Let the configuration of a whole with a language model in it say the same of special tokens, if it says any."""
    text = config.get_text_config()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if config is not text and getattr(config, name, None) is not None:
            setattr(config, name, getattr(text, name))


def _part_tied(merged: PreTrainedModel) -> None:
    """Write as several what was one weight in the base model and is no longer: an adapter trained a copy of it."""
    pairs = {name: merged.get_parameter(name) for pair in merged.all_tied_weights_keys.items() for name in pair}
    parted = [
        (one, other)
        for one, other in merged.all_tied_weights_keys.items()
        if not torch.equal(pairs[one], pairs[other])
    ]
    if not parted:
        return
    if merged.config.is_encoder_decoder:
        raise FNSFTError(
            f"{' and '.join(parted[0])} are one weight in this model, of which the adapter trained a copy; train it "
            "everywhere (ensure_weight_tying=True) or not at all"
        )
    merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    for name in merged.all_tied_weights_keys:
        module, _, parameter = name.rpartition(".")
        setattr(merged.get_submodule(module), parameter, nn.Parameter(pairs[name].detach().clone()))
