"""An adapter merged into its base model, as an ordinary checkpoint."""

import os
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat.transformers import align_special_tokens
from ..errors import FNSFTError
from ..hub.card import merged_card
from ..occupied import EXPORTED_MODEL, check_target, write_export_mark
from ..template.storage import CARD_FILE, NETWORK_DIR
from ..template.template import FunctionalNetworkTemplate
from ..tuner.saved import SavedAdapter
from ..writing import disk_errors, files_written_whole
from .adapter import sources_of


_OWNED = ("model*.safetensors", "model*.safetensors.index.json", NETWORK_DIR)  # of an older export
# Task type of an adapter -> what the Hub calls it.
_PIPELINES = {
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def to_merged(
    adapter_dir: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "auto", **loading
) -> PeftConfig:
    """Merge a saved adapter into its base model and save the result as an ordinary checkpoint.

    The base model is loaded with the head of the adapter's task, and with as many tokens and labels as the adapter was
    trained with. With its tokenizer, whose special tokens (what ends an answer) the model's configurations get too, a
    model card, and the template and the selection that lie beside the adapter.

    Args:
        adapter_dir: directory of a saved adapter, of neuron deltas or any other PEFT method that merges.
        output_dir: where the checkpoint is written.
        dtype: precision to load the base model in; `"auto"` is that of its checkpoint.
        loading: further arguments of `from_pretrained` for the base model: `device_map`, `trust_remote_code`, and
            `revision`, by default the one that is kept in the adapter's configuration.

    Returns:
        The configuration of the adapter.

    Raises:
        FNSFTError: it is no adapter or one that does not merge, the base model is quantised or not the one that was
            trained on, there is no tokenizer, or the output directory is one of those that are read.
        ValueError: the merged weights are not finite.
    """
    adapter = SavedAdapter.read(adapter_dir)
    if adapter.config.is_prompt_learning:
        raise FNSFTError(
            f"{adapter_dir} holds an adapter of type {adapter.config.peft_type}, which is part of the input and "
            "merges into no weights; load it with PEFT"
        )
    check_target(output_dir, EXPORTED_MODEL, sources=sources_of(adapter))
    if "quantization_config" not in loading:
        _check_precision(adapter, adapter.base_config(**loading))
    processor = adapter.load_processor(**loading)
    base = adapter.load_base(dtype=dtype, **loading)
    _check_precision(adapter, base.config)
    if (adapter.directory / NETWORK_DIR).is_dir():  # warns where a branch of the base model has moved on
        FunctionalNetworkTemplate.from_pretrained(adapter.directory / NETWORK_DIR).check_model(base)
    merged = adapter.load_onto(base).merge_and_unload(safe_merge=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    _check_tokens(adapter, tokenizer, merged, loading)
    align_special_tokens(merged, tokenizer)
    _align_whole(merged.config)
    _part_tied(merged)
    pipeline = _PIPELINES.get(adapter.config.task_type, "text-generation" if merged.can_generate() else None)
    with disk_errors(output_dir), files_written_whole(output_dir, owned=_OWNED, exchanged=True) as scratch:
        merged.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        _describe_merged(adapter, scratch, pipeline)
        write_export_mark(scratch, "merged")
    return adapter.config


def _check_precision(adapter: SavedAdapter, config: PretrainedConfig) -> None:
    """Refuse a quantised base, whatever the adapter: its frozen neurons would be quantised anew."""
    if getattr(config, "quantization_config", None) is not None:
        raise FNSFTError(
            f"the base model {adapter.config.base_model_name_or_path} is quantised, and a merge would quantise all of "
            "it anew, frozen neurons included; name the same model in full precision in base_model_name_or_path of "
            f"{adapter.directory}/adapter_config.json, or export a plain LoRA"
        )


def _check_tokens(adapter: SavedAdapter, tokenizer, merged: PreTrainedModel, loading: dict) -> None:
    """Refuse tokens that were added for the training and have no rows."""
    rows = len(merged.get_input_embeddings().weight)
    if not adapter.has_tokenizer or len(tokenizer) <= rows:
        return
    of_base = adapter.load_processor(of_base=True, **loading)
    if len(tokenizer) > len(getattr(of_base, "tokenizer", of_base)):  # some models have rows for fewer from the start
        raise FNSFTError(
            f"the tokenizer in {adapter.directory} has {len(tokenizer)} tokens and the model {rows} rows for them: "
            "the adapter was saved without the rows of those that were added; save it with save_embedding_layers=True"
        )


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


def _describe_merged(adapter: SavedAdapter, output_dir: Path, pipeline: str | None) -> None:
    card = adapter.directory / CARD_FILE
    adapter_card = card.read_text(encoding="utf-8") if card.is_file() else None
    merged = merged_card(adapter.config.base_model_name_or_path, adapter_card, pipeline=pipeline)
    (output_dir / CARD_FILE).write_text(merged, encoding="utf-8")
    if (adapter.directory / NETWORK_DIR).is_dir():
        shutil.copytree(adapter.directory / NETWORK_DIR, output_dir / NETWORK_DIR, dirs_exist_ok=True)
