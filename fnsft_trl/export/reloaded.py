"""What a fresh process finds in an export: its logits, and which neurons differ from the base model.

    python -m fnsft_trl.export.reloaded FILE

FILE is a safetensors file with `ids.N` and `logits.N` of every prompt, and the settings as JSON in its metadata.
Prints a JSON object; see [`found`].
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..errors import FNSFTError
from ..evaluation.reload import last_logits
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, find_neuron_sites
from ..tuner.saved import SavedAdapter, load_model
from .difference import changed_neurons


def found(settings: Mapping[str, Any], prompts: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Load an export and compare it with what its source computed.

    Args:
        settings: `form`, `place`, `source`, `site` of the neurons, `texts` of the prompts, and `loading`:
            `trust_remote_code` and, where it was given, the `revision` of the base model.
        prompts: (ids, shape (1, positions); logits of the source after the last) of each.

    Returns:
        A mapping of these. `difference`: the largest absolute difference of the logits. `largest`: the largest
        absolute logit. `tokens`: numbers of the texts that the tokenizer there tokenizes differently. `neurons`:
        layer -> neurons that differ from the base model, as text, or null where weights are rounded. `others`:
        parameters that differ in an entry that belongs to no neuron. `own`: whether the base model is the source.
    """
    form, place, loading = settings["form"], settings["place"], settings["loading"]
    model = _load(form, place, **loading).eval()
    differences = [float((last_logits(model, ids) - logits).abs().max()) for ids, logits in prompts]
    told: dict[str, Any] = {"difference": max(differences, key=lambda value: (value != value, value))}
    told |= {"largest": max(float(logits.abs().max()) for _, logits in prompts), "tokens": [], "others": []}
    told |= {"neurons": None, "own": not (Path(settings["source"]) / "adapter_config.json").is_file()}
    if form == "gguf":  # whose weights are rounded, and whose tokenizer only llama.cpp reads as it is
        return told
    if settings["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=loading["trust_remote_code"])
        made = [tokenizer(text)["input_ids"] for text in settings["texts"]]
        told["tokens"] = [number for number, ids in enumerate(made) if ids != prompts[number][0][0].tolist()]
    if form == "lora":
        model = model.merge_and_unload()
    base = _load_base(settings["source"], dtype=model.dtype, **loading)
    sites = find_neuron_sites(base, kind=settings["site"])
    before, after = (dict(each.named_parameters()) for each in (base, model))
    if form == "smaller":
        after = _in_old_places(model, sites, after)
    both = [name for name in before if name in after and before[name].shape == after[name].shape]
    changed, others = changed_neurons(sites, {name: before[name] for name in both}, after)
    return told | {"neurons": changed.to_ranges(), "others": [*others, *sorted(before.keys() - set(both))]}


def _load_base(source: str, *, trust_remote_code: bool, **loading) -> nn.Module:
    """The base model of an adapter, or the source itself."""
    if (Path(source) / "adapter_config.json").is_file():
        return SavedAdapter.read(source).load_base(trust_remote_code=trust_remote_code, **loading)
    return load_model(source, dtype=loading["dtype"], trust_remote_code=trust_remote_code)


def _load(form: str, place: str, *, trust_remote_code: bool, **loading) -> nn.Module:
    if form == "gguf":
        path = Path(place)
        plain = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype="float32", quantization_config=plain
        )
    if form == "lora":
        saved = SavedAdapter.read(place)
        return saved.load_onto(saved.load_base(trust_remote_code=trust_remote_code, **loading))
    return load_model(place, trust_remote_code=trust_remote_code)


def _in_old_places(
    model: nn.Module, sites: list[NeuronSite], after: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parameters of a smaller model with every kept neuron where it was, and zeros for those that are gone.

    Raises:
        FNSFTError: the config does not say which neurons are gone, or there are not as many as it says.
    """
    said = vars(model.config).get("removed_neurons")
    if said is None:
        raise FNSFTError("its config.json does not say which neurons were removed (removed_neurons)")
    widths = {site.layer: site.width for site in sites}
    removed = NeuronMask.from_ranges(said["neurons"], widths, "mlp_intermediate")
    now = find_neuron_sites(model)
    for site, small in zip(sites, now, strict=True):
        kept = (~removed.layers[site.layer]).nonzero().flatten()
        if len(kept) > small.width:
            raise FNSFTError(f"layer {site.layer} has {small.width} neurons, and {len(kept)} were kept of it")
        for old, new in zip(site.layout.slices, small.layout.slices, strict=True):
            values = after[new.full_name].detach()
            shape = list(values.shape)
            shape[old.dim] = old.count * len(old.offsets)
            whole = values.new_zeros(shape)
            taken = values.index_select(new.dim, new.indices(torch.arange(len(kept))))
            after[old.full_name] = whole.index_copy_(old.dim, old.indices(kept), taken)
    return after


def _main(file: str) -> None:
    with safe_open(file, "pt") as tensors:
        settings = json.loads(tensors.metadata()["settings"])
        numbers = range(settings["prompts"])
        prompts = [(tensors.get_tensor(f"ids.{n}"), tensors.get_tensor(f"logits.{n}")) for n in numbers]
    sys.stdout.write(json.dumps(found(settings, prompts)) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
