"""What left training: a merged checkpoint or a plain LoRA, and which neurons differ between two sets of weights."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from .card import merged_card
from .errors import FNSFTError
from .neurons import NeuronSite, WeightSlice, base_linear, find_neuron_sites, linear_shape
from .selection import NeuronMask
from .storage import CARD_FILE, NETWORK_DIR
from .tuner import NeuronTunerConfig


_PREFIX = "base_model.model."
# Arguments of LoRA beside the deltas that have a counterpart in one LoRA for all modules.
_PLAIN_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "alpha_pattern", "rank_pattern"}


def _any_adapter_config(directory: str | os.PathLike) -> PeftConfig:
    if not (Path(directory) / "adapter_config.json").is_file():
        raise FNSFTError(f"{directory} holds no adapter_config.json: not a directory of a saved adapter")
    config = PeftConfig.from_pretrained(str(directory))
    if not config.base_model_name_or_path:
        raise FNSFTError(f"{directory}/adapter_config.json does not name its base model (base_model_name_or_path)")
    return config


def _adapter_config(directory: str | os.PathLike) -> NeuronTunerConfig:
    config = _any_adapter_config(directory)
    if not isinstance(config, NeuronTunerConfig):
        raise FNSFTError(f"{directory} holds an adapter of type {config.peft_type}; one of neuron deltas was expected")
    return config


def _load(name: str | os.PathLike, *, dtype: str = "auto", **loading):
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **loading)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FNSFTError(f"the model {str(name)!r} cannot be loaded ({reason})") from error


def _delta_key(part: WeightSlice) -> str:
    return f"{_PREFIX}{part.module_name}.neuron_delta_{part.parameter}"


def _mask(config: NeuronTunerConfig, sites: Sequence[NeuronSite]) -> NeuronMask:
    return NeuronMask.from_ranges(config.neurons, {site.layer: site.width for site in sites}, config.site)


def to_plain_lora(
    model_or_adapter: PeftModel | str | os.PathLike, output_dir: str | os.PathLike, *, adapter_name: str = "default"
) -> LoraConfig:
    """Write neuron deltas as an ordinary LoRA, which PEFT loads without this package.

    A delta D of the positions S is the product of two factors of rank |S|, one of which is one-hot:

        neurons are outputs:  B = one-hot of S, shape (out, |S|);  A = D, shape (|S|, in)
        neurons are inputs:   B = D^T, shape (out, |S|);           A = one-hot of S, shape (|S|, in)

    with a scaling of 1. Deltas of biases become the bias of `lora_B`, which PEFT then gives to all modules of the
    adapter; it merges them only if each of these has a bias in the base model. LoRA beside the deltas, modules and
    token rows saved as a whole go along. The one-hot factors make the files larger than those of the deltas.

    In a model with experts, PEFT adapts the parameters themselves (`target_parameters`), those of shared experts and
    dense layers too. All experts of a layer have one rank, which is the largest number of positions in any of them.

    Args:
        model_or_adapter: a `PeftModel` with neuron deltas, or the directory of a saved one.
        output_dir: where `adapter_config.json` and `adapter_model.safetensors` are written.
        adapter_name: which adapter of a `PeftModel`.

    Returns:
        The configuration that was written.

    Raises:
        FNSFTError: it is no adapter of neuron deltas, LoRA beside them is of a variant that cannot go along, or a
            linear layer beside experts has a delta of its bias.
    """
    if isinstance(model_or_adapter, PeftModel):
        config = model_or_adapter.peft_config[adapter_name]
        if not isinstance(config, NeuronTunerConfig):
            raise FNSFTError(f"adapter {adapter_name!r} is of type {config.peft_type}, not one of neuron deltas")
        state = get_peft_model_state_dict(model_or_adapter, adapter_name=adapter_name)
        base = model_or_adapter.get_base_model()
    else:
        config = _adapter_config(model_or_adapter)
        state = load_peft_weights(str(model_or_adapter), device="cpu")
        with torch.device("meta"):  # only its structure is read
            base = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
            )
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
    tensors = {key: value for key, value in state.items() if "neuron_delta_" not in key and ".lora_" not in key}
    for name, (a, b) in [*deltas.items(), *beside.items()]:
        holder = _holder(name, deltas, base) if has_experts and name in deltas else name.removesuffix(".weight")
        tensors[f"{_PREFIX}{holder}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{holder}.lora_B.weight"] = b
        if biases:
            bias = biases.get(holder)
            tensors[f"{_PREFIX}{holder}.lora_B.bias"] = b.new_zeros(len(b)) if bias is None else bias
    modules = list(beside) if has_experts else [*(name.removesuffix(".weight") for name in deltas), *beside]
    experts = {site.experts.name: len(site.experts.module.down_proj) for site in sites if site.experts}
    ranks = {name.removesuffix("" if has_experts else ".weight"): len(a) for name, (a, _) in deltas.items()}
    for name in ranks:
        if has_experts and not name.endswith("_bias"):
            ranks[name] //= experts.get(name.rpartition(".")[0], 1)
    ranks |= {name: len(a) for name, (a, _) in beside.items()}
    largest = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    lora = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(modules),
        target_parameters=sorted(deltas) if has_experts else None,
        lora_bias=bool(biases),
        fan_in_fan_out=any(isinstance(base_linear(base.get_submodule(name)), Conv1D) for name in modules),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    output_dir = Path(output_dir)
    lora.save_pretrained(str(output_dir))
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, output_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    return lora


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
    mask = _mask(config, sites)
    for site in sites:
        for part in site.layout.slices:
            delta = state.get(_delta_key(part))
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
    mask = _mask(config, sites)
    for site in sites:
        for part in site.layout.slices:
            delta = state.get(_delta_key(part))
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
        name, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        if found:
            alpha_key = get_pattern_key(lora.alpha_pattern, name)
            alpha = lora.alpha_pattern.get(alpha_key, lora.lora_alpha)
            scaling = alpha / (math.sqrt(len(a)) if lora.use_rslora else len(a))
            factors[name] = (a, state[key.replace("lora_A", "lora_B")] * scaling)
    return factors


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
    config = _any_adapter_config(adapter_dir)
    loading.setdefault("revision", config.revision)
    base = _load(config.base_model_name_or_path, dtype=dtype, **loading)
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


def changed_neurons(
    sites: Sequence[NeuronSite], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[NeuronMask, list[str]]:
    """Compare two sets of weights of one model, value by value (-0 equals 0).

    Args:
        sites: the model's sites.
        before, after: parameter name -> tensor, with the same names and shapes.

    Returns:
        The neurons any of whose weights differ; and the names of the parameters that differ in an entry that belongs
        to no neuron.
    """
    differing = {name: before[name] != after[name] for name in before if not torch.equal(before[name], after[name])}
    layers = {}
    for site in sites:
        members = torch.zeros(site.width, dtype=torch.bool)
        for part in site.layout.slices:
            entries = differing.pop(part.full_name, None)
            if entries is not None:
                members[part.touched(entries)] = True
        layers[site.layer] = members
    return NeuronMask(layers, sites[0].kind), sorted(differing)


def verify_merge(
    before: str | os.PathLike | Mapping[str, torch.Tensor],
    after: str | os.PathLike | Mapping[str, torch.Tensor],
    adapter: str | os.PathLike | NeuronMask | None = None,
    *,
    sites: Sequence[NeuronSite] | None = None,
) -> NeuronMask:
    """Find the neurons that differ between two checkpoints, and check that they are those an adapter says.

    With the directory of an adapter, every weight of its neurons must be, bit for bit, the base value plus the delta
    in the precision of the checkpoint, and nothing else may differ but what the adapter trains besides. With a
    NeuronMask, the neurons that differ must be exactly its members, and nothing else may differ.

    Args:
        before, after: directories of checkpoints, or parameter name -> tensor.
        adapter: what should have changed; nothing is checked without it.
        sites: the model's sites; needed when `before` is not a directory.

    Returns:
        The neurons any of whose weights differ.

    Raises:
        FNSFTError: another weight differs, or one does not hold what it should; with the module and the neuron.
    """
    config = None if adapter is None or isinstance(adapter, NeuronMask) else _adapter_config(adapter)
    kind = config.site if config else adapter.site if isinstance(adapter, NeuronMask) else "mlp_intermediate"
    if isinstance(before, Mapping):
        if sites is None:
            raise FNSFTError("two sets of tensors say nothing of the model's structure; give sites too")
    else:
        is_base = config is not None and str(before) == config.base_model_name_or_path
        model = _load(before, revision=config.revision if is_base else None)
        before, sites = dict(model.named_parameters()), find_neuron_sites(model, kind=kind)
    if not isinstance(after, Mapping):
        after = dict(_load(after).named_parameters())
    for name in before:
        if name not in after or before[name].shape != after[name].shape:
            raise FNSFTError(f"{name} is missing after, or of another shape; the checkpoints are of different models")
        if before[name].dtype != after[name].dtype:
            raise FNSFTError(f"{name} is {before[name].dtype} before and {after[name].dtype} after; use one precision")
    changed, others = changed_neurons(sites, before, after)
    if adapter is None:
        return changed

    state: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu") if config else {}
    expected = _mask(config, sites) if config else adapter
    for site in sites:
        extra = changed.layers[site.layer] & ~expected.layers[site.layer]
        if extra.any():
            neuron = int(extra.nonzero()[0])
            raise FNSFTError(
                f"{int(extra.sum())} neurons of layer {site.layer} ({site.name}) differ that should not; the first is "
                f"neuron {neuron}"
            )
        missing = expected.layers[site.layer] & ~changed.layers[site.layer]
        if config is None and missing.any():
            neuron = int(missing.nonzero()[0])
            raise FNSFTError(f"neuron {neuron} of layer {site.layer} ({site.name}) should differ, but does not")
        if config is not None:
            _check_values(site, expected.indices(site.layer), state, before, after)
    trained = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in state if "neuron_delta_" not in key}
    trained = {name.partition(".lora_")[0].partition(".token_adapter")[0] for name in trained}
    for name in others:
        if name.rpartition(".")[0] not in trained:
            raise FNSFTError(
                f"{name} differs in a weight that belongs to no neuron and that the adapter does not train"
            )
    return changed


def _check_values(site: NeuronSite, neurons: torch.Tensor, state, before, after) -> None:
    for part in site.layout.slices:
        delta = state.get(_delta_key(part))
        if delta is None:
            continue
        name, positions = part.full_name, part.indices(neurons)
        rows, found = (part.select(values[name].detach(), positions) for values in (before, after))
        wrong = (rows + delta.view_as(rows)).to(rows.dtype) != found
        if wrong.any():
            first = int(wrong.reshape(len(positions), -1).any(1).nonzero()[0])
            neuron = int(part.held(neurons).repeat(len(part.offsets))[first])
            raise FNSFTError(
                f"{name} of neuron {neuron} (layer {site.layer}) is not the base value plus the adapter's delta"
            )
