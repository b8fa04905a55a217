"""An adapter merged into its base model, as an ordinary checkpoint."""

import os
from typing import Any

from peft import PeftConfig

from ..errors import FNSFTError
from .whole import WholeSource
from .written import written_model


def to_merged(
    adapter_dir: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "auto", **loading: Any
) -> PeftConfig:
    """Merge a saved adapter into its base model and save the result as an ordinary checkpoint.

    The base model is loaded with the head of the adapter's task, and with as many tokens and labels as the adapter was
    trained with. With its tokenizer, whose special tokens (what ends an answer) the model's configurations get too, a
    model card, and the template and the selection that lie beside the adapter. Weights are merged one by one into
    files, and saved in shards of at most 5 GB.

    Args:
        adapter_dir: directory of a saved adapter, of neuron deltas or any other PEFT method that merges.
        output_dir: where the checkpoint is written.
        dtype: precision to load the base model in; `"auto"` is that of its checkpoint.
        loading: further arguments of `from_pretrained` for the base model: `device_map`, `trust_remote_code`, and
            `revision`, by default the one that is kept in the adapter's configuration.

    Returns:
        The configuration of the adapter.

    Raises:
        FNSFTError: it is no adapter, or one that does not merge. The base model is quantised, or not the one that was
            trained on. There is no tokenizer. The output directory is one of those that are read. A merged weight is
            not finite.
    """
    source = WholeSource.read(adapter_dir)
    if source.adapter is None:
        raise FNSFTError(
            f"{adapter_dir} holds a whole model (config.json), which needs no merge: load it as it is; an adapter was "
            "expected"
        )
    with written_model(source, output_dir, "merged", dtype=dtype, loading=loading):
        pass
    return source.adapter.config
