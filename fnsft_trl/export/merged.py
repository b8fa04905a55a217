"""An adapter merged into its base model, as an ordinary checkpoint."""

import os
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from ..hub.card import merged_card
from ..template.storage import CARD_FILE, NETWORK_DIR
from .adapter import load_model, read_adapter_config


def to_merged(
    adapter_dir: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "auto", **loading
) -> PeftConfig:
    """Merge a saved adapter into its base model and save the result as an ordinary checkpoint.

    With its tokenizer, a model card, and the template and the selection that lie beside the adapter.

    Args:
        adapter_dir: directory of a saved adapter, of neuron deltas or any other PEFT method that merges.
        output_dir: where the checkpoint is written.
        dtype: precision to load the base model in; `"auto"` is that of its checkpoint.
        loading: further arguments of `from_pretrained` for the base model: `device_map`, `trust_remote_code`, and
            `revision`, by default the one that is kept in the adapter's configuration.

    Returns:
        The configuration of the adapter.

    Raises:
        FNSFTError: it is no adapter, or the base is quantised.
        ValueError: the merged weights are not finite.
    """
    config = read_adapter_config(adapter_dir)
    loading.setdefault("revision", config.revision)
    base = load_model(config.base_model_name_or_path, dtype=dtype, **loading)
    merged = PeftModel.from_pretrained(base, str(adapter_dir)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output_dir)
    has_tokenizer = (Path(adapter_dir) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        adapter_dir if has_tokenizer else config.base_model_name_or_path,
        revision=None if has_tokenizer else loading["revision"],
        trust_remote_code=loading.get("trust_remote_code", False),
    )
    tokenizer.save_pretrained(output_dir)
    _describe_merged(config, Path(adapter_dir), Path(output_dir))
    return config


def _describe_merged(config: PeftConfig, adapter_dir: Path, output_dir: Path) -> None:
    card = adapter_dir / CARD_FILE
    adapter_card = card.read_text(encoding="utf-8") if card.is_file() else None
    merged = merged_card(config.base_model_name_or_path, adapter_card)
    (output_dir / CARD_FILE).write_text(merged, encoding="utf-8")
    if (adapter_dir / NETWORK_DIR).is_dir():
        shutil.copytree(adapter_dir / NETWORK_DIR, output_dir / NETWORK_DIR, dirs_exist_ok=True)
