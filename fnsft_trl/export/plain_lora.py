"""Neuron deltas as an ordinary LoRA, which PEFT and other tools load without this package."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import Conv1D

from ..compat.peft import get_pattern_key
from ..errors import FNSFTError
from ..neurons.sites import NeuronSite, WeightSlice, base_linear, find_neuron_sites, linear_shape
from ..occupied import EXPORTED_ADAPTER, check_target, write_export_mark
from ..tuner import NeuronTunerConfig
from ..tuner.saved import PREFIX
from ..writing import disk_errors, files_written_whole
from .adapter import delta_key, delta_mask, read_deltas, sources_of


# Arguments of LoRA beside the deltas that have a counterpart in one LoRA for all modules.
_PLAIN_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "alpha_pattern", "rank_pattern"}


def to_plain_lora(
    model_or_adapter: PeftModel | str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    adapter_name: str = "default",
    **loading: Any,
) -> LoraConfig:
    """Write neuron deltas as an ordinary LoRA, which PEFT loads without this package.

    A delta D of the positions S is the product of two factors of rank |S|, one of which is one-hot:

        neurons are outputs:  B = one-hot of S, shape (out, |S|);  A = D, shape (|S|, in)
        neurons are inputs:   B = D^T, shape (out, |S|);           A = one-hot of S, shape (|S|, in)

    with a scaling of 1. Deltas of biases become the bias of `lora_B`, which PEFT then gives to all modules of the
    adapter. PEFT merges them only if each of these has a bias in the base model. LoRA beside the deltas, modules and
    token rows saved as a whole go along, and so does a tokenizer that lies beside the adapter. The one-hot factors
    make the files larger than those of the deltas.

    In a model with experts, PEFT adapts the parameters themselves (`target_parameters`), those of shared experts and
    dense layers too. All experts of a layer have one rank, which is the largest number of positions in any of them.

    Args:
        model_or_adapter: a `PeftModel` with neuron deltas, or the directory of a saved one.
        output_dir: where `adapter_config.json` and `adapter_model.safetensors` are written.
        adapter_name: which adapter of a `PeftModel`.
        loading: of a saved adapter, arguments of `from_pretrained` that say which its base model is.

    Returns:
        The configuration that was written.

    Raises:
        FNSFTError: it is no adapter of neuron deltas; LoRA beside them is of a variant that cannot go along; a linear
            layer beside experts has a delta of its bias. The output directory is one of those that are read.
    """
    processor = None
    if isinstance(model_or_adapter, PeftModel):
        check_target(output_dir, EXPORTED_ADAPTER)
        lora, tensors = _as_lora(*_of_model(model_or_adapter, adapter_name))
    else:
        saved = read_deltas(model_or_adapter)
        check_target(output_dir, EXPORTED_ADAPTER, sources=sources_of(saved))
        if saved.has_tokenizer:
            processor = saved.load_processor(**loading)
        lora, tensors = _as_lora(saved.config, saved.tensors, saved.outline(**loading))
    with disk_errors(output_dir), files_written_whole(output_dir, exchanged=True) as scratch:
        lora.save_pretrained(str(scratch))
        if processor is not None:
            processor.save_pretrained(scratch)
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        write_export_mark(scratch, "lora")
    return lora


def _as_lora(
    config: NeuronTunerConfig, state: Mapping[str, torch.Tensor], base: nn.Module
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration of the LoRA and its tensors, of configuration and tensors of deltas."""
    refused = set(config.lora or {}) - _PLAIN_LORA
    if refused:
        raise FNSFTError(
            f"LoRA beside the deltas has {', '.join(sorted(refused))}, which one plain LoRA for all modules cannot "
            "express; export it merged"
        )
    sites = find_neuron_sites(base, kind=config.site)
    has_experts = any(site.experts for site in sites)
    deltas = _delta_factors(config, state, sites, base)
    biases = _linear_biases(config, state, sites)
    if biases and has_experts:
        raise FNSFTError(
            f"{next(iter(biases))} has a delta of its bias, which plain LoRA cannot express in a model with experts; "
            "export it merged"
        )
    beside = _factors_beside(config, state)
    modules = list(beside) if has_experts else [*(name.removesuffix(".weight") for name in deltas), *beside]
    lora = _lora_config(
        config,
        _ranks(deltas, beside, sites),
        target_modules=sorted(modules),
        target_parameters=sorted(deltas) if has_experts else None,
        lora_bias=bool(biases),
        fan_in_fan_out=any(isinstance(base_linear(base.get_submodule(name)), Conv1D) for name in modules),
    )
    whole = {key: value for key, value in state.items() if "neuron_delta_" not in key and ".lora_" not in key}
    holders = {name: _holder(name, deltas, base) if has_experts else name.removesuffix(".weight") for name in deltas}
    tensors = {**whole, **_named_factors({holders[name]: pair for name, pair in deltas.items()} | beside, biases)}
    return lora, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _of_model(model: PeftModel, adapter_name: str) -> tuple[NeuronTunerConfig, Mapping[str, torch.Tensor], nn.Module]:
    """Configuration and weights of the deltas, and the base model, of which only the structure counts."""
    config = model.peft_config[adapter_name]
    if not isinstance(config, NeuronTunerConfig):
        raise FNSFTError(f"adapter {adapter_name!r} is of type {config.peft_type}, not one of neuron deltas")
    return config, get_peft_model_state_dict(model, adapter_name=adapter_name), model.get_base_model()


def _lora_config(config: NeuronTunerConfig, ranks: Mapping[str, int], **targets) -> LoraConfig:
    """LoRA with a scaling of 1 everywhere; ranks below the largest stand in its patterns."""
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        **targets,
    )


def _ranks(deltas: Mapping[str, tuple], beside: Mapping[str, tuple], sites: Sequence[NeuronSite]) -> dict[str, int]:
    """The rank of every adapted module, or parameter in a model with experts."""
    experts = {site.experts.name: len(site.experts.module.down_proj) for site in sites if site.experts}
    ranks = {name.removesuffix("" if experts else ".weight"): len(a) for name, (a, _) in deltas.items()}
    for name in ranks:
        if experts and not name.endswith("_bias"):
            ranks[name] //= experts.get(name.rpartition(".")[0], 1)
    return ranks | {name: len(a) for name, (a, _) in beside.items()}


def _named_factors(factors: Mapping[str, tuple], biases: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All factors under the names of PEFT's tensors; with biases, every `lora_B` has one."""
    tensors = {}
    for holder, (a, b) in factors.items():
        tensors[f"{PREFIX}{holder}.lora_A.weight"] = a
        tensors[f"{PREFIX}{holder}.lora_B.weight"] = b
        if biases:
            bias = biases.get(holder)
            tensors[f"{PREFIX}{holder}.lora_B.bias"] = b.new_zeros(len(b)) if bias is None else bias
    return tensors


def _holder(name: str, deltas: Mapping[str, object], base: nn.Module) -> str:
    """Name of the layer that PEFT makes for a bare parameter: it wraps a module once for each, in their order."""
    module_name, _, parameter = name.rpartition(".")
    module = base_linear(base.get_submodule(module_name))
    wrapped = [other for other, _ in module.named_parameters(recurse=False) if f"{module_name}.{other}" in deltas]
    return module_name + ".base_layer" * (len(wrapped) - 1 - wrapped.index(parameter))


def _delta_factors(
    config: NeuronTunerConfig, state: Mapping[str, torch.Tensor], sites: Sequence[NeuronSite], base: nn.Module
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameter name -> (A, B), with a scaling of 1, of all deltas but those of linear layers' biases."""
    factors = {}
    mask = delta_mask(config, sites)
    for site in sites:
        for part in site.layout.slices:
            delta = state.get(delta_key(part))
            if delta is None or part.parameter == "bias":
                continue
            positions = part.indices(mask.indices(site.layer)).to(delta.device)
            if site.experts and part.module_name == site.experts.name:
                factors[part.full_name] = _expert_factors(site.experts.module, part, positions, delta)
                continue
            n_in, n_out = linear_shape(base.get_submodule(part.module_name))
            if part.side == "output":
                factors[part.full_name] = (delta, _one_hot(positions, n_out, delta).T)
            else:
                factors[part.full_name] = (_one_hot(positions, n_in, delta), delta.T)
    return factors


def _expert_factors(module: nn.Module, part: WeightSlice, positions: torch.Tensor, delta: torch.Tensor):
    """(A, B) of a delta of one parameter of all experts, in the shape that PEFT gives them."""
    parameter = getattr(module, part.parameter)
    experts = len(parameter)
    if part.parameter.endswith("_bias"):  # one matrix of shape (experts, out), and one row of A for each position
        hot, width = positions, parameter.shape[1]
        if 0 in part.dims:
            hot, owner = positions % width, positions // width
            delta = delta[:, None] * _one_hot(owner, experts, delta)  # (positions, experts)
        return _one_hot(hot, width, delta), delta.T
    n_in, n_out = parameter.shape[1:] if module.is_transposed else parameter.shape[:0:-1]
    if 0 not in part.dims:  # every expert has all positions
        a = delta.view(len(positions), experts, n_in).transpose(0, 1)
        b = _one_hot(positions, n_out, delta).T[..., None].expand(-1, -1, experts)
        return a.reshape(-1, n_in), b.reshape(n_out, -1)
    size = n_out if part.side == "output" else n_in
    owner, local = positions // size, positions % size
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=experts)
    rank = int(counts.max())
    number = torch.empty_like(owner)  # of a position within its expert
    number[order] = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
    a, b = delta.new_zeros(experts, rank, n_in), delta.new_zeros(n_out, rank, experts)
    if part.side == "output":
        a[owner, number] = delta
        b[local, number, owner] = 1
    else:
        a[owner, number, local] = 1
        b[:, number, owner] = delta.T
    return a.view(-1, n_in), b.view(n_out, -1)


def _one_hot(positions: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    """Row i is 1 at the i-th position, shape (positions, size)."""
    rows = like.new_zeros(len(positions), size)
    rows[torch.arange(len(positions)), positions] = 1
    return rows


def _linear_biases(
    config: NeuronTunerConfig, state: Mapping[str, torch.Tensor], sites: Sequence[NeuronSite]
) -> dict[str, torch.Tensor]:
    """Module name -> change of the bias, shape (out,), of linear layers."""
    biases = {}
    mask = delta_mask(config, sites)
    for site in sites:
        for part in site.layout.slices:
            delta = state.get(delta_key(part))
            if delta is not None and part.parameter == "bias":
                positions = part.indices(mask.indices(site.layer)).to(delta.device)
                whole = delta.new_zeros(part.count * len(part.offsets))
                biases[part.module_name] = whole.index_copy_(0, positions, delta.detach())
    return biases


def _factors_beside(config: NeuronTunerConfig, state: Mapping[str, torch.Tensor]):
    """Module name -> (A, B), with a scaling of 1, of LoRA beside the deltas."""
    factors = {}
    lora = LoraConfig(**config.lora) if config.lora else None
    for key, a in state.items():
        name, found, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if found:
            alpha_key = get_pattern_key(lora.alpha_pattern, name)
            alpha = lora.alpha_pattern.get(alpha_key, lora.lora_alpha)
            scaling = alpha / (math.sqrt(len(a)) if lora.use_rslora else len(a))
            factors[name] = (a, state[key.replace("lora_A", "lora_B")] * scaling)
    return factors
