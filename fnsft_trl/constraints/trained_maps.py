"""TrainedMap: a linear map of the model that trains, and the tensor in which its change is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Conv1D

from ..compat.peft import BaseTunerLayer, LoraLayer, ParamWrapper
from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model, find_neuron_sites, linear_shape
from ..tuner import LinearDeltaLayer, NeuronDeltaLayer, NeuronTunerConfig
from .lora_config import HELD_LORA_FIELDS, REFUSED_INITS, REFUSED_LORA_FIELDS


# LoraConfig field -> why what it trains has no directions that it could be kept off.
_REFUSED_FIELDS = REFUSED_LORA_FIELDS | {
    "use_dora": "DoRA divides by the norm of the changed weight, so its change is not the product of its factors",
    "lora_bias": "the bias of lora_B answers to every input",
    "target_parameters": "experts are given the tokens that are routed to them, so their inputs have no directions",
    "modules_to_save": "it trains modules as a whole, whose inputs may be no vectors",
    "trainable_token_indices": "it trains rows of the embedding, whose inputs are tokens and no vectors",
}
_ALLOWED = HELD_LORA_FIELDS - _REFUSED_FIELDS.keys()


@dataclass(eq=False)
class TrainedMap:
    """A linear map that trains.

    Attributes:
        module (`str`): its name in the base model.
        parameter (`nn.Parameter`): what trains: the factor A of a LoRA, the rows or columns of a delta, or the weight.
        is_transposed (`bool`): whether inputs are counted along the first dimension of the parameter.
        inputs (`torch.Tensor`, *optional*): the inputs that the parameter has entries of, or of which they train,
            shape (inputs,); all by default.
        rows (`torch.Tensor`, *optional*): the outputs of which the entries train, shape (rows,); all by default.
        holds_base (`bool`): whether the parameter is the weight itself, base and change together.
        is_subset (`bool`): whether the parameter has no other entries than those of `inputs`.
        factor (`nn.Parameter`, *optional*): B, where the change is B A.
        others (`list[nn.Parameter]`): what trains beside it and answers to every input: biases of a delta.
    """

    module: str
    parameter: nn.Parameter
    is_transposed: bool = False
    inputs: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    holds_base: bool = False
    is_subset: bool = False
    factor: nn.Parameter | None = None
    others: list[nn.Parameter] = field(default_factory=list)


def trained_maps(
    model: nn.Module, trainable: NeuronMask | None, reached: Collection[str]
) -> tuple[list[TrainedMap], list[str]]:
    """The linear maps of a model that train.

    Args:
        model: as it is trained: with an adapter, or the parameters to train requiring gradients.
        trainable: of a run held to neurons, those that may change.
        reached: names of the linear modules that text reaches. Of an adapter, all must be.

    Returns:
        The maps, and the names of parameters that train and are in none of them: only of a model without an adapter.

    Raises:
        FNSFTError: an adapter trains what has no directions, with the reason.
    """
    base = base_model(model)
    is_adapted = any(isinstance(module, BaseTunerLayer) for module in base.modules())
    partial = {} if trainable is None else _partial_slices(base, trainable)
    found = list(_adapted(model, partial) if is_adapted else _weights(base, partial, reached))
    covered = {id(p) for each in found for p in (each.parameter, each.factor, *each.others) if p is not None}
    left = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in covered]
    if is_adapted and left:
        raise FNSFTError(
            f"{left[0]} trains, and is no weight of a linear layer whose inputs have directions, so nothing of it can "
            "be protected; train linear layers alone, or drop protect"
        )
    if unreached := [each.module for each in found if each.module not in reached]:
        raise FNSFTError(
            f"{unreached[0]} trains, but no text reaches it, so its input has no directions; leave it out of the "
            "targets, or drop protect"
        )
    if not found:
        raise FNSFTError("no linear layer trains, so there is nothing that protect could protect; drop it")
    return found, left


def check_adapter(config) -> None:
    """Refuse an adapter of which the change of a weight is not B A, or is not all that it changes.

    Args:
        config: of an adapter, or `None`.

    Raises:
        FNSFTError: naming the field.
    """
    if isinstance(config, NeuronTunerConfig):
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, name):
                raise FNSFTError(f"{name} cannot be protected: {_REFUSED_FIELDS[name]}; drop it, or protect")
        config = LoraConfig(**config.lora) if config.lora else None
    if config is None:
        return
    if not isinstance(config, LoraConfig):
        raise FNSFTError(
            f"protect does not know adapters of {type(config).__name__}; use LoRA, neuron deltas or full fine-tuning"
        )
    plain = LoraConfig()
    for name in (each.name for each in fields(config)):
        value = getattr(config, name)
        if name not in _ALLOWED and value and value != getattr(plain, name):
            reason = _REFUSED_FIELDS.get(name, "this version of fnsft_trl does not know it")
            raise FNSFTError(f"LoRA with {name} cannot be protected: {reason}; drop {name}, or protect")
    init = str(config.init_lora_weights)
    for name, why in REFUSED_INITS.items():
        if init == str(name) or (name and init.startswith(f"{name}_")):
            raise FNSFTError(f"init_lora_weights={init!r} cannot be protected: {why}; leave it out")
    if config.bias != "none":
        raise FNSFTError(
            f"LoRA with bias={config.bias!r} cannot be protected, for biases answer to every input; set bias=none"
        )


def _partial_slices(base: nn.Module, trainable: NeuronMask) -> dict[str, tuple[str, torch.Tensor]]:
    """Module -> the side that its neurons are on, and the positions that train, where that are not all."""
    found = {}
    for site in find_neuron_sites(base, kind=trainable.site):
        members = trainable.layers.get(site.layer)
        neurons = torch.arange(0) if members is None else members.nonzero().flatten()
        if len(neurons) == site.width:
            continue
        for part in site.layout.slices:
            if part.parameter == "weight":
                found[part.module_name] = (part.side, part.indices(neurons))
    return found


def _adapted(model: nn.Module, partial: dict[str, tuple[str, torch.Tensor]]) -> Iterator[TrainedMap]:
    """Those that the active adapters train."""
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        check_adapter(config)
    for name, module in base_model(model).named_modules():
        if isinstance(module, ParamWrapper) or (isinstance(module, LoraLayer) and linear_shape(module) is None):
            continue  # refused as what trains without directions
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.lora_A and module.lora_A[adapter].weight.requires_grad:
                    side, positions = partial.get(name, ("output", None))
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    yield TrainedMap(name, a, inputs=positions if side == "input" else None, factor=b)
        elif isinstance(module, LinearDeltaLayer):
            yield from _deltas(name, module)


def _deltas(name: str, module: NeuronDeltaLayer) -> Iterator[TrainedMap]:
    for adapter in module.active_adapters:
        slices = module.slices.get(adapter, {})
        if "weight" not in slices:
            continue
        values = module.neuron_delta_weight[adapter].values
        if not values.requires_grad:
            continue
        biases = [module.neuron_delta_bias[adapter].values] if "bias" in slices else []
        if slices["weight"].side == "output":
            yield TrainedMap(name, values, others=biases)
        else:
            positions = module.positions_weight[adapter]
            yield TrainedMap(name, values, is_transposed=True, inputs=positions, is_subset=True, others=biases)


def _weights(
    base: nn.Module, partial: dict[str, tuple[str, torch.Tensor]], reached: Collection[str]
) -> Iterator[TrainedMap]:
    """Those of which the weight itself trains, and no other module has it."""
    owners: dict[int, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in base.named_modules():
        if linear_shape(module) is None or name not in reached:
            continue
        weight = module.weight
        if not (weight.requires_grad and owners[id(weight)] == 1):
            continue
        side, positions = partial.get(name, (None, None))
        yield TrainedMap(
            name,
            weight,
            is_transposed=isinstance(module, Conv1D),
            inputs=positions if side == "input" else None,
            rows=positions if side == "output" else None,
            holds_base=True,
        )
