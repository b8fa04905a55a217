"""LoRA and full fine-tuning held to a NeuronMask, exactly: every neuron outside it stays bit-identical.

LoRA: with the weight change B A, a frozen output neuron needs a zero row of B and a frozen input neuron a zero column
of A. They start at zero, and masks on the output of `lora_B` and the input of `lora_A` keep their gradients at exactly
zero, under which no optimizer moves a zero (weight decay included). Checkpoints are plain PEFT files.

Full: gradients of frozen slices are zeroed as they are accumulated, so that clipping does not count them, and the
slices are put back after every step, so that weight decay does not move them either.
"""

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .errors import FNSFTError
from .neurons import NeuronSite, WeightSlice, check_modules_to_save, find_neuron_sites
from .selection import NeuronMask


# LoraConfig field -> why the frozen neurons could not be held exactly when it is set.
_REFUSED_LORA_FIELDS = {
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
    "target_parameters": "adapters on bare parameters have no lora_A and lora_B to mask",
    "megatron_config": "Megatron layers shard their neurons",
}
_EXACT_INITS = (True, "gaussian")


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
    for field, reason in _REFUSED_LORA_FIELDS.items():
        if getattr(config, field, None):
            raise FNSFTError(
                f"LoRA with {field} cannot be held to a set of neurons: {reason}; drop {field}, or use "
                "train_method=neuron_delta"
            )
    if config.init_lora_weights not in _EXACT_INITS:
        raise FNSFTError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights or starts from a lora_B that is "
            f"not zero; use one of: {', '.join(map(str, _EXACT_INITS))}"
        )
    if config.bias != "none":
        raise FNSFTError(f"LoRA with bias={config.bias!r} trains biases of frozen neurons; use bias='none'")
    names = [name for s in find_neuron_sites(model, kind=site) for name in s.layout.modules()]
    check_modules_to_save(config.modules_to_save, names)


def set_lora_targets(config: LoraConfig, model: nn.Module, trainable: NeuronMask) -> None:
    """Give LoRA without `target_modules` those of the layers with trainable neurons: up, gate and down projections.

    Args:
        config: changed in place.
        model: the base model.
        trainable: the neurons that may change.

    Raises:
        FNSFTError: the configuration names targets, but no MLP module of such a layer.
    """
    sites = [s for s in find_neuron_sites(model, kind=trainable.site) if trainable.layers[s.layer].any()]
    for site in sites:
        site.check_no_experts("LoRA")
    names = [name for site in sites for name in site.layout.modules()]
    targets = config.target_modules
    if targets is None:
        config.target_modules = sorted(names)
    elif targets != "all-linear" and not any(check_target_module_exists(config, name) for name in names):
        listed = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise FNSFTError(
            f"the LoRA targets ({listed}) hold no MLP module, so no neuron could train; name some of "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}, or leave target_modules out"
        )


def constrain_lora(model: nn.Module, trainable: NeuronMask, *, adapter_name: str = "default") -> None:
    """Hold an unmerged LoRA adapter to a set of neurons. Other targets of the adapter (attention) train as usual.

    Args:
        model: a `PeftModel` with LoRA on MLP modules.
        trainable: the neurons that may change. Layers it does not cover are frozen.
        adapter_name: the adapter.

    Raises:
        FNSFTError: the adapter has no MLP module, is of a variant that cannot be held, or already changes a neuron
            that should be frozen.
    """
    check_lora_config(model.peft_config[adapter_name], model, trainable.site)
    held = 0
    for site, frozen in _frozen_by_site(model, trainable):
        if len(frozen) < site.width:
            site.check_no_experts("LoRA")
        for part, layer in _weight_slices(model, site):
            if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
                continue
            held += 1
            positions = part.indices(frozen)
            lora_a, lora_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            size = layer.out_features if part.side == "output" else layer.in_features
            is_frozen = torch.zeros(size, dtype=torch.bool)
            is_frozen[positions] = True
            with torch.no_grad():
                if part.side == "output":
                    if lora_b.weight[is_frozen].any():
                        raise _already_changed(part.module_name)
                    lora_b.register_forward_hook(_mask_output(is_frozen))
                else:
                    if lora_b.weight.any() and lora_a.weight[:, is_frozen].any():
                        raise _already_changed(part.module_name)
                    lora_a.weight[:, is_frozen] = 0
                    lora_a.register_forward_pre_hook(_mask_input(is_frozen))
    if held == 0:
        raise FNSFTError(f"adapter {adapter_name!r} has no LoRA on an MLP module, so there is no neuron to train")


def _already_changed(name: str) -> FNSFTError:
    return FNSFTError(
        f"the LoRA adapter already changes neurons of {name} that should be frozen; merge it into the base model, or "
        "start from a new adapter"
    )


def _mask_input(is_frozen: torch.Tensor):
    return lambda module, args: (args[0].masked_fill(is_frozen.to(args[0].device), 0), *args[1:])


def _mask_output(is_frozen: torch.Tensor):
    return lambda module, args, output: output.masked_fill(is_frozen.to(output.device), 0)


def _frozen_by_site(model: nn.Module, trainable: NeuronMask):
    """(site, numbers of its frozen neurons) for every site of the model."""
    for site in find_neuron_sites(model, kind=trainable.site):
        members = trainable.layers.get(site.layer)
        if members is None:
            members = torch.zeros(site.width, dtype=torch.bool)
        if len(members) != site.width:
            raise FNSFTError(
                f"the mask has {len(members)} neurons in layer {site.layer}, the model {site.width}; it was made for "
                "another model"
            )
        yield site, (~members).nonzero().flatten()


def _weight_slices(model: nn.Module, site: NeuronSite):
    for part in site.layout.slices:
        if part.parameter == "weight":
            yield part, model.get_submodule(part.module_name)


class FrozenSlices:
    """Full fine-tuning in which frozen neurons stay bit-identical. Made by [`constrain_full`].

    Attributes:
        slices (`list`): (parameter, part, frozen positions, their values) of every partly frozen parameter.
    """

    def __init__(self) -> None:
        self.slices: list[tuple[nn.Parameter, WeightSlice, torch.Tensor, torch.Tensor]] = []

    def hold(self, parameter: nn.Parameter, part: WeightSlice, frozen: torch.Tensor) -> None:
        """Freeze those of a site's neurons that have a part in one parameter."""
        count = len(part.held(frozen))
        if count == part.count:
            parameter.requires_grad_(False)
            return
        if count == 0:
            return
        positions = part.indices(frozen).to(parameter.device)
        self.slices.append((parameter, part, positions, part.select(parameter.detach(), positions)))
        mask = part.mask(frozen, parameter)

        def zero_gradient(parameter: nn.Parameter) -> None:
            parameter.grad.masked_fill_(mask, 0)

        parameter.register_post_accumulate_grad_hook(zero_gradient)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the frozen values back after every step of this optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.restore())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen values back."""
        for parameter, part, positions, values in self.slices:
            part.write(parameter, positions, values)


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
    """Refuse optimizers that step during the backward pass, before frozen gradients could be masked.

    Raises:
        FNSFTError: for such an optimizer.
    """
    if "layerwise" in name or "lomo" in name:
        raise FNSFTError(
            f"optim={name} updates weights during the backward pass, so frozen neurons could not be held exactly; use "
            "one that steps after it, such as adamw_torch"
        )
