"""fnsft discover --basis_only: the leading directions of the inputs of all linear layers, found, saved and pushed."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..config import FunctionalNetworkConfig
from ..data.sequences import token_sequences
from ..discovery.directions import LEADING, KeptDirections, KeptText
from ..discovery.inputs import reached_linears
from ..discovery.saved_directions import save_directions
from ..errors import FNSFTError
from ..hub.card import TAGS, card_text, plain
from ..hub.files import push_directory
from ..hub.names import UNKNOWN, absolute_sources, model_name, source_names
from ..template.storage import CARD_FILE
from ..training.protection_config import DIMS
from ..writing import write_text_whole


def find_basis(
    model,
    tokenizer,
    texts: Mapping[str, Any],
    config: FunctionalNetworkConfig,
    output_dir: Path,
    *,
    push: dict[str, Any] | None,
    is_main: bool,
) -> None:
    """Find the directions on texts, each of which counts alike, save them, and push them where that is asked for.

    Args:
        model, tokenizer: as they were loaded.
        texts: name -> rows.
        config: how much is read, and how many directions are found (`ica_store_basis`).
        output_dir: where to.
        push: arguments of a push, or `None`.
        is_main: whether this process writes.

    Raises:
        FNSFTError: there are several processes, or no text.
    """
    if PartialState().num_processes > 1:
        raise FNSFTError("basis_only runs in one process; start it without accelerate (device_map spreads a model)")
    each, found = config.ica_max_tokens // len(texts), {}
    for (name, rows), shown in zip(texts.items(), source_names(absolute_sources(list(texts))), strict=True):
        sequences, tokens = [], 0
        rows = islice(rows, config.ica_template_samples_per_ds)
        for sequence in token_sequences(rows, tokenizer, max_length=config.ica_max_length, name=name):
            ids = sequence.ids[: each - tokens + 1]
            if len(ids) > 1:
                sequences.append(ids)
                tokens += len(ids) - 1
            if tokens >= each:
                break
        if not sequences:
            raise FNSFTError(f"{name} holds no text with more than one token; give some sentences")
        found[shown] = KeptText(sequences)
    modules = sorted(reached_linears(model, next(iter(found.values())).sequences[0]))
    leading = config.ica_store_basis or DIMS
    kept = KeptDirections.find(model, modules, found, leading=leading, batch_size=config.ica_batch_size)
    about = {
        "base_model": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "leading": leading,
        "texts": {name: text.tokens for name, text in found.items()},
        "sinks": {name: sinks.count for name, sinks in kept.sinks.items()},
    }
    if not is_main:
        return
    save_directions(kept, output_dir, about)
    write_text_whole(output_dir / CARD_FILE, _card(about, len(modules)))
    print(f"Directions of {len(kept.inputs)} inputs of {len(modules)} linear layers saved to: {output_dir}")
    if push is not None:
        arguments = {"commit_message": "Upload directions of inputs", **push}
        print(f"Pushed to: {push_directory(output_dir, arguments.pop('repo_id'), **arguments)}")


def _card(about: dict[str, Any], modules: int) -> str:
    texts = plain(", ".join(f"{name} ({tokens} tokens)" for name, tokens in about["texts"].items()))
    body = f"""
# Directions of inputs of {plain(about["base_model"] or UNKNOWN)}

Of the inputs of {modules} linear layers: position 0, the mean of all other tokens and {about["leading"]} leading
directions ({LEADING + about["leading"]} orthonormal vectors each), found on {texts}. `fnsft_trl` keeps a fine-tune off
them: `protect: subspace` with `protect_basis`. They hold no weights of the model, and are of no use for another one.
"""
    return card_text({"library_name": "fnsft_trl", "tags": TAGS}, body)
