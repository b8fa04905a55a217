"""LoRA and full fine-tuning held to a NeuronMask, exactly: every neuron outside it stays bit-identical.

LoRA: with the weight change B A, a frozen output neuron needs a zero row of B and a frozen input neuron a zero column
of A. They start at zero, and masks on the output of `lora_B` and the input of `lora_A` keep their gradients at exactly
zero. Optimizers in full precision then leave them at zero (weight decay included); those with state in 8 bits do not,
so they are put back after every step. Where PEFT adapts a bare parameter (the experts of a layer), it uses the factors
without calling `lora_A` and `lora_B`: there the gradients of the frozen entries are zeroed as they are accumulated.
Checkpoints are plain PEFT files.

Full: gradients of frozen slices are zeroed as they are accumulated, so that clipping does not count them, and the
slices are put back after every step, so that weight decay does not move them either.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.pytorch_utils import Conv1D

from .errors import FNSFTError
from .layout import mask_positions, select_positions, write_positions
from .neurons import NeuronSite, WeightSlice, check_modules_to_save, find_neuron_sites
from .selection import NeuronMask


# LoraConfig field -> why the frozen neurons could not be held exactly when it is set.
REFUSED_LORA_FIELDS = {
    "use_dora": "DoRA rescales every row of the weight, frozen ones included",
    "lora_bias": "the bias of lora_B changes every output neuron",
    "use_qalora": "QALoRA pools the inputs of lora_A over neurons",
    "use_bdlora": "block-diagonal LoRA stores A and B in a shape of its own",
    "velora_config": "VeLoRA replaces the input of lora_A by a projection",
    "kasa_config": "KaSA truncates the base weight",
    "monteclora_config": "MonteCLoRA samples the weights of lora_A",
    "arrow_config": "Arrow mixes several adapters per token",
    "alora_invocation_tokens": "an activated LoRA does not merge",
    "layer_replication": "replicated layers share their base weights",
    "megatron_config": "Megatron layers shard their neurons",
}
# Fields that leave B A as the weight change of the MLPs, and those that belong to another field or to the file.
HELD_LORA_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("qalora_group_size", "megatron_core", "runtime_config", "inference_mode"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
}
# Under these the weight change B A is zero at the start, and the base weights are left alone.
EXACT_INITS = (True, "gaussian", "eva", "orthogonal", "mica")
# Those that PEFT has for bare parameters.
BARE_INITS = (True, "gaussian")
# init_lora_weights -> why it is refused. Values that continue one of these (pissa_niter_4) are refused with it.
REFUSED_INITS = {
    False: "it starts from a random weight change",
    "olora": "it changes the base weights",
    "pissa": "it changes the base weights",
    "corda": "it changes the base weights",
    "lora_ga": "it changes the base weights",
    "loftq": "it quantises the base weights",
}

# Part of an optimizer's name -> why full fine-tuning refuses it.
REFUSED_OPTIMIZERS = {
    "layerwise": "updates weights during the backward pass",
    "lomo": "updates weights during the backward pass",
    "schedule_free": "keeps a second copy of the weights, which takes their place at evaluations and saves",
}


def trainable_neurons(model: nn.Module, mask: NeuronMask, train: str) -> NeuronMask:
    """The neurons whose weights may change, over all layers of the model.

    Args:
        model: the model.
        mask: the selection; layers that it does not cover count as not selected.
        train: `"selected"`, `"unselected"` or `"all"`.

    Raises:
        FNSFTError: nothing, or with `"unselected"` everything, would be trained.
    """
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=mask.site)}
    for layer, members in mask.layers.items():
        if widths.get(layer) != len(members):
            raise FNSFTError(
                f"the mask has {len(members)} neurons in layer {layer}, the model "
                f"{widths.get(layer, 'no such layer')}; it was made for another model"
            )
    selected = NeuronMask.from_ranges(mask.to_ranges(), widths, mask.site)
    trainable = {"selected": selected, "unselected": ~selected, "all": selected | ~selected}[train]
    if trainable.count == 0:
        raise FNSFTError(f"train_neurons={train} leaves no neuron trainable: the selection holds {mask.count} neurons")
    if train == "unselected" and selected.count == 0:
        raise FNSFTError("train_neurons=unselected with an empty selection freezes nothing")
    return trainable


def check_lora_config(config: LoraConfig, model: nn.Module, site: str) -> None:
    """Check that LoRA with this configuration can be held to a set of neurons exactly.

    Raises:
        FNSFTError: a variant that cannot be exact, with the reason.
    """
    plain = LoraConfig()
    for name in (field.name for field in fields(config)):
        if name not in HELD_LORA_FIELDS and getattr(config, name) != getattr(plain, name):
            reason = REFUSED_LORA_FIELDS.get(name, "this version of fnsft_trl does not know it")
            raise FNSFTError(
                f"LoRA with {name} cannot be held to a set of neurons: {reason}; drop {name}, or use "
                "train_method=neuron_delta"
            )
    init = config.init_lora_weights
    if init not in EXACT_INITS:
        known = (why for name, why in REFUSED_INITS.items() if init == name or str(init).startswith(f"{name}_"))
        raise FNSFTError(
            f"init_lora_weights={init!r} cannot be held to a set of neurons: "
            f"{next(known, 'this version of fnsft_trl does not know it')}; use one of: "
            f"{', '.join(map(str, EXACT_INITS))}"
        )
    if config.bias != "none":
        raise FNSFTError(f"LoRA with bias={config.bias!r} trains biases of frozen neurons; use bias='none'")
    names = [name for s in find_neuron_sites(model, kind=site) for name in s.layout.modules()]
    check_modules_to_save(config.modules_to_save, names)


def set_lora_targets(config: LoraConfig, model: nn.Module, trainable: NeuronMask) -> None:
    """Give LoRA without targets those of the layers with trainable neurons: up, gate and down projections.

    In a model with experts, all of them become `target_parameters`: experts have no linear layers, and PEFT takes the
    names of other MLP layers for those that experts had in older checkpoints.

    Args:
        config: changed in place.
        model: the base model.
        trainable: the neurons that may change.

    Raises:
        FNSFTError: the configuration names targets, but no MLP module of such a layer; or it asks of experts what
            PEFT cannot do on bare parameters.
    """
    everywhere = find_neuron_sites(model, kind=trainable.site)
    sites = [s for s in everywhere if trainable.layers[s.layer].any()]
    names = [name for site in sites for name in site.layout.modules()]
    targets = config.target_modules
    has_targets = targets is not None or bool(config.target_parameters)
    if any(site.experts for site in everywhere):
        parts = [part for site in sites for part in site.layout.slices if not part.parameter.endswith("bias")]
        if not has_targets or config.target_parameters:
            _check_bare_targets(config)
        if not has_targets:
            quantised = [part.full_name for part in parts if not part.tensor(model).is_floating_point()]
            if quantised:
                raise FNSFTError(
                    f"{quantised[0]} is quantised, so PEFT cannot adapt it as it does the experts beside it; name "
                    "target_parameters (those of the experts), or use train_method=neuron_delta"
                )
            config.target_modules, config.target_parameters = [], sorted(part.full_name for part in parts)
    elif not has_targets:
        config.target_modules = sorted(names)
    elif (
        targets != "all-linear"
        and not config.target_parameters
        and not any(check_target_module_exists(config, name) for name in names)
    ):
        listed = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise FNSFTError(
            f"the LoRA targets ({listed}) hold no MLP module, so no neuron could train; name some of "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}, or leave target_modules out"
        )


def _check_bare_targets(config: LoraConfig) -> None:
    """Refuse what PEFT cannot do where LoRA adapts bare parameters."""
    if config.lora_dropout:
        raise FNSFTError(
            f"lora_dropout is {config.lora_dropout}, and PEFT has no dropout on the weights of experts; use "
            "lora_dropout=0"
        )
    if config.init_lora_weights not in BARE_INITS:
        raise FNSFTError(
            f"init_lora_weights={config.init_lora_weights!r} does not exist on the weights of experts; use one of: "
            f"{', '.join(map(str, BARE_INITS))}"
        )


@dataclass(frozen=True)
class FactorSlice:
    """The factor of a LoRA adapter in which the neurons of a [`WeightSlice`] have entries of their own.

    With the weight change B A, output neurons have a row of B each, and input neurons a column of A. LoRA on the
    weights of E experts keeps the factors of all of them in one: A of shape (E * rank, in), B of shape
    (out, rank * E).

    Attributes:
        layer (`LoraLayer`): the layer that holds the factor.
        factor (`nn.Module`): `lora_A` or `lora_B` of the adapter.
        part (`WeightSlice`): where the neurons are in the base weight.
        shape (`tuple[int, ...]`): shape of the factor in which they lie along `dims`.
        dims (`tuple[int, ...]`): the dimensions that count their positions.
    """

    layer: LoraLayer
    factor: nn.Module
    part: WeightSlice
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def is_bare(self) -> bool:
        """Whether PEFT adapts a bare parameter, using the factor's weight without calling the factor."""
        return isinstance(self.layer, ParamWrapper)

    def positions(self, neurons: torch.Tensor) -> torch.Tensor:
        """Positions of neurons along `dims`, in the order of `part.indices`."""
        positions = self.part.indices(neurons)
        if len(self.dims) == 1 or self.part.side == "input":
            return positions
        out, _, experts = self.shape
        return positions % out * experts + positions // out  # B counts the experts last

    def rows(self, neurons: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the entries of some neurons, shape (positions, ...), from the factor's whole weight."""
        weight = weight.detach().view(self.shape)
        return select_positions(weight, self.dims, self.positions(neurons).to(weight.device))


def factor_slices(model: nn.Module, site: NeuronSite, adapter_name: str) -> Iterator[FactorSlice]:
    """Where the neurons of a site are in the factors of a LoRA adapter.

    Raises:
        FNSFTError: the adapter changes a parameter of the MLP in whose factors neurons have no entries of their own.
    """
    for part in site.layout.slices:
        layer = model.get_submodule(part.module_name)
        while isinstance(layer, ParamWrapper) and layer.parameter_name != part.parameter:
            layer = layer.base_layer
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        is_bare, is_bias = isinstance(layer, ParamWrapper), part.parameter.endswith("bias")
        is_quantised = not part.tensor(model).is_floating_point()
        if is_bare and (is_bias or is_quantised or isinstance(layer.get_base_layer(), Conv1D)):
            raise FNSFTError(
                f"LoRA on the bare parameter {part.full_name} cannot be held to a set of neurons, which have no "
                "entries of their own in its factors; name weights of experts, or modules (target_modules)"
            )
        if is_bias:
            continue
        factor = (layer.lora_B if part.side == "output" else layer.lora_A)[adapter_name]
        rows, columns = shape = factor.weight.shape
        dims = (0,) if part.side == "output" else (1,)
        if is_bare and len(part.dims) > 1:
            experts = layer.num_experts
            dims = (0, 2)
            if part.side == "output":
                shape = (rows, columns // experts, experts)
            else:
                shape = (experts, rows // experts, columns)
        yield FactorSlice(layer, factor, part, tuple(shape), dims)


def constrain_lora(model: nn.Module, trainable: NeuronMask, *, adapter_name: str = "default") -> "FrozenSlices":
    """Hold an unmerged LoRA adapter to a set of neurons. Other targets of the adapter (attention) train as usual.

    Args:
        model: a `PeftModel` with LoRA on MLP modules, or on the weights of experts.
        trainable: the neurons that may change. Layers it does not cover are frozen.
        adapter_name: the adapter.

    Returns:
        The frozen slices of its factors. An optimizer with state in 8 bits moves zeros that have no gradient: `attach`
        the result to it. For that, the model must be on its device when this is called.

    Raises:
        FNSFTError: the adapter has no MLP module, is of a variant that cannot be held, or already changes a neuron
            that should be frozen.
    """
    check_lora_config(model.peft_config[adapter_name], model, trainable.site)
    held = FrozenSlices()
    adapted = trained = 0
    for site, frozen in _frozen_by_site(model, trainable):
        for found in factor_slices(model, site, adapter_name):
            part = found.part
            adapted += 1
            trained += part.count - len(part.held(frozen))
            if not part.tensor(model).is_floating_point():
                found.layer.merge = _refuse_merge(part.module_name)
            _freeze_factor(held, found, adapter_name, frozen)
    if adapted == 0:
        raise FNSFTError(f"adapter {adapter_name!r} has no LoRA on an MLP module, so there is no neuron to train")
    if trained == 0:
        raise FNSFTError(
            f"no trainable neuron lies in a layer that adapter {adapter_name!r} adapts, so none could train; adapt "
            "other layers, or select other neurons"
        )
    return held


@torch.no_grad()
def _freeze_factor(held: "FrozenSlices", found: FactorSlice, adapter_name: str, frozen: torch.Tensor) -> None:
    """Zero the frozen neurons' entries of a factor, and keep their gradients at zero."""
    weight, positions = found.factor.weight, found.positions(frozen)
    view = weight.view(found.shape)
    is_frozen = mask_positions(view, found.dims, positions)
    a, b = found.layer.lora_A[adapter_name].weight, found.layer.lora_B[adapter_name].weight
    experts = found.layer.num_experts if found.is_bare else 1
    only_frozen = (view * is_frozen).view(weight.shape)
    if _changes_anything(*((a, only_frozen) if weight is b else (only_frozen, b)), experts):
        raise FNSFTError(
            f"the LoRA adapter already changes neurons of {found.part.module_name} that should be frozen; merge it "
            "into the base model, or start from a new adapter"
        )
    view.masked_fill_(is_frozen, 0)
    if found.is_bare:
        held.freeze(weight, found.dims, positions, shape=found.shape)
        found.layer.register_forward_pre_hook(_check_is_trained(found.factor, weight, found.part.full_name))
        return
    held.keep(weight, found.dims, positions)
    if found.part.side == "output":
        found.factor.register_forward_hook(_mask_output(is_frozen.flatten()))
    else:
        found.factor.register_forward_pre_hook(_mask_input(is_frozen.flatten()))


def _check_is_trained(factor: nn.Module, weight: nn.Parameter, name: str):
    """A hook that stops training when another tensor has taken the place of the one whose gradients are masked."""

    def check(module: nn.Module, args: tuple) -> None:
        if factor.weight is not weight and torch.is_grad_enabled() and factor.weight.requires_grad:
            raise FNSFTError(
                f"the LoRA factor on {name} was replaced (by sharding, or in a copy of the model) since "
                "constrain_lora masked its gradients; use plain data parallelism, and call constrain_lora on the "
                "model that is trained"
            )

    return check


def _changes_anything(a: torch.Tensor, b: torch.Tensor, experts: int) -> bool:
    """Whether the weight change B A is more than the rounding of factors that are orthogonal to each other."""
    if not (a.any() and b.any()):
        return False
    change = torch.einsum("ore,eri->eoi", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1]))
    return bool(change.norm() > 1e-5 * a.norm() * b.norm())


def _refuse_merge(name: str):
    def merge(*args, **kwargs):
        raise FNSFTError(
            f"LoRA cannot be merged into {name}, which is quantised: it would be quantised anew, frozen neurons "
            "included; load the base model unquantised, load the adapter, then merge"
        )

    return merge


def _mask_input(is_frozen: torch.Tensor):
    return lambda module, args: (args[0].masked_fill(is_frozen.to(args[0].device), 0), *args[1:])


def _mask_output(is_frozen: torch.Tensor):
    return lambda module, args, output: output.masked_fill(is_frozen.to(output.device), 0)


def _frozen_by_site(model: nn.Module, trainable: NeuronMask):
    """(site, numbers of its frozen neurons) for every site of the model."""
    sites = find_neuron_sites(model, kind=trainable.site)
    if unknown := sorted(trainable.layers.keys() - {site.layer for site in sites}):
        raise FNSFTError(
            f"the mask has neurons in layer {unknown[0]}, the model ends at layer {sites[-1].layer}; it was made for "
            "another model"
        )
    for site in sites:
        members = trainable.layers.get(site.layer)
        if members is None:
            members = torch.zeros(site.width, dtype=torch.bool)
        if len(members) != site.width:
            raise FNSFTError(
                f"the mask has {len(members)} neurons in layer {site.layer}, the model {site.width}; it was made for "
                "another model"
            )
        yield site, (~members).nonzero().flatten()


# Names of the optimizer state that moves a weight even where its gradient is zero; state1 is bitsandbytes' name.
_MOMENTA = ("exp_avg", "momentum_buffer", "grad_avg", "state1")


class FrozenSlices:
    """Slices of parameters that stay bit-identical. Made by [`constrain_full`] and [`constrain_lora`].

    Attributes:
        slices (`list`): (parameter, shape to view it in or `None`, dimensions, frozen positions along them, their
            values) of every partly frozen parameter. Of a sharded parameter (`DTensor`), positions and values are
            those of this process's shard.
    """

    def __init__(self) -> None:
        self.slices: list[
            tuple[nn.Parameter, tuple[int, ...] | None, tuple[int, ...], torch.Tensor, torch.Tensor]
        ] = []
        self._hooks = []

    def hold(
        self, parameter: nn.Parameter, part: WeightSlice, frozen: torch.Tensor, *, for_a_while: bool = False
    ) -> None:
        """Freeze those of a site's neurons that have a part in one parameter.

        Args:
            parameter: the parameter.
            part: which of its entries belong to which neuron.
            frozen: numbers of the neurons, shape (m,).
            for_a_while: whether they are to be released again.
        """
        count = len(part.held(frozen))
        if count == part.count and not for_a_while:
            parameter.requires_grad_(False)
            return
        if count == 0:
            return
        self.freeze(parameter, part.dims, part.indices(frozen))

    def freeze(
        self,
        parameter: nn.Parameter,
        dims: tuple[int, ...],
        positions: torch.Tensor,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Zero the gradients of some positions as they are accumulated, and note their values, to be put back.

        Args:
            parameter: the parameter.
            dims: the dimensions that count positions.
            positions: the positions along them, shape (m,).
            shape: view the parameter in this shape.
        """
        mask = self.keep(parameter, dims, positions, shape=shape)

        def zero_gradient(parameter: nn.Parameter) -> None:
            _local(parameter.grad, shape).masked_fill_(mask, 0)

        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)  # without, as in an adapter that is not active yet, there can be no hook
        self._hooks.append(parameter.register_post_accumulate_grad_hook(zero_gradient))
        parameter.requires_grad_(requires_grad)

    def keep(
        self,
        parameter: nn.Parameter,
        dims: tuple[int, ...],
        positions: torch.Tensor,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Note the values of some positions, to be put back; returns their mask within this process's shard."""
        positions = _local_positions(parameter, dims, positions.to(parameter.device))
        local = _local(parameter.detach(), shape)
        self.slices.append((parameter, shape, dims, positions, select_positions(local, dims, positions)))
        return mask_positions(local, dims, positions)

    @property
    def masks_gradients(self) -> bool:
        """Whether frozen positions depend on gradients that are zeroed as they are accumulated."""
        return bool(self._hooks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the frozen values back after every step of this optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.restore())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen values back."""
        for parameter, shape, dims, positions, values in self.slices:
            write_positions(_local(parameter, shape), dims, positions, values)

    def release(self) -> None:
        """Let all positions train again."""
        for hook in self._hooks:
            hook.remove()
        self.slices, self._hooks = [], []

    @torch.no_grad()
    def clear_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the momentum of the frozen positions.

        Running means of squared gradients stay: without them the first steps after a release would be many times
        too large.
        """
        for parameter, shape, dims, positions, _ in self.slices:
            mask = mask_positions(_local(parameter, shape), dims, positions)
            if shape is not None:
                mask = mask.expand(shape).reshape(parameter.shape)
            state = optimizer.state.get(parameter, {})
            for name in state.keys() & set(_MOMENTA):
                momentum = _local(state[name])  # AdEMAMix stacks two of the parameter's shape
                # Momentum in 8 bits holds indices into a table of values.
                zero = int(state["qmap1"].abs().argmin()) if momentum.dtype == torch.uint8 else 0
                momentum.masked_fill_(mask, zero)


def _local(tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor if shape is None else tensor.view(shape)


def _local_positions(parameter: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """The positions that lie in this process's shard, counted within it."""
    if not isinstance(parameter, DTensor):
        return positions
    if len(dims) > 1:
        raise FNSFTError(
            "expert weights that are sharded (FSDP) cannot be held to neurons yet; use plain data parallelism"
        )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = positions - offset[dims[0]]
    return local[(local >= 0) & (local < shape[dims[0]])]


def hold_neurons(held: FrozenSlices, model: nn.Module, frozen: NeuronMask) -> None:
    """Freeze neurons for a while, on top of those that a run freezes throughout.

    Args:
        held: takes the frozen slices; `held.release()` ends it.
        model: a model held by [`constrain_full`].
        frozen: the neurons to freeze.
    """
    for site, neurons in _frozen_by_site(model, ~frozen):
        for part in site.layout.slices:
            parameter = part.tensor(model)
            if parameter.requires_grad:
                held.hold(parameter, part, neurons, for_a_while=True)


def constrain_full(model: nn.Module, trainable: NeuronMask, *, train_other: bool) -> FrozenSlices:
    """Hold full fine-tuning to a set of neurons.

    Sets `requires_grad` of every parameter, and masks the gradients of those that are frozen in part. To be called
    when the model is on its device; the caller attaches the result to the optimizer.

    Args:
        model: a transformers model without adapters, not quantised.
        trainable: the neurons that may change.
        train_other: whether the weights that belong to no neuron (attention, norms, embeddings, the bias of the down
            projection) train too.

    Raises:
        FNSFTError: the model is quantised.
    """
    sites = list(_frozen_by_site(model, trainable))
    for site, _ in sites:
        for part in site.layout.slices:
            if not part.tensor(model).is_floating_point():
                raise FNSFTError(
                    f"{part.module_name} is quantised, so its weights cannot be trained; use "
                    "train_method=neuron_delta or lora"
                )
    model.requires_grad_(train_other)
    held = FrozenSlices()
    for site, frozen in sites:
        for part in site.layout.slices:
            parameter = part.tensor(model)
            parameter.requires_grad_(True)
            held.hold(parameter, part, frozen)
    return held


def check_optimizer_name(name: str) -> None:
    """Refuse optimizers that write weights at other times than their step, after which frozen ones are put back.

    Raises:
        FNSFTError: for such an optimizer.
    """
    for part, reason in REFUSED_OPTIMIZERS.items():
        if part in name:
            raise FNSFTError(
                f"optim={name} {reason}, so frozen neurons could not be held exactly; use one that steps after the "
                "backward pass, such as adamw_torch, or train_method=neuron_delta"
            )
