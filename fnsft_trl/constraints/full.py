"""Full fine-tuning held to a NeuronMask.

Gradients of frozen slices are zeroed as they are accumulated, so that clipping does not count them, and the slices are
put back after every step, so that weight decay does not move them either.
"""

from torch import nn

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from .frozen import FrozenSlices
from .neurons import frozen_by_site


# Part of an optimizer's name -> why full fine-tuning refuses it.
REFUSED_OPTIMIZERS = {
    "layerwise": "updates weights during the backward pass",
    "lomo": "updates weights during the backward pass",
    "schedule_free": "keeps a second copy of the weights, which takes their place at evaluations and saves",
}


def freeze_neurons(slices: FrozenSlices, model: nn.Module, frozen: NeuronMask) -> None:
    """Freeze neurons for a while, on top of those that a run freezes throughout.

    Args:
        slices: takes what is frozen; `slices.release()` ends it.
        model: a model constrained by [`constrain_full`].
        frozen: the neurons to freeze.
    """
    for site, neurons in frozen_by_site(model, ~frozen):
        for part in site.layout.slices:
            parameter = part.tensor(model)
            if parameter.requires_grad:
                slices.freeze_neurons(parameter, part, neurons, for_a_while=True)


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
    sites = list(frozen_by_site(model, trainable))
    for site, _ in sites:
        for part in site.layout.slices:
            if not part.tensor(model).is_floating_point():
                raise FNSFTError(
                    f"{part.module_name} is quantised, so its weights cannot be trained; use "
                    "train_method=neuron_delta or lora"
                )
    model.requires_grad_(train_other)
    slices = FrozenSlices()
    for site, frozen in sites:
        for part in site.layout.slices:
            parameter = part.tensor(model)
            parameter.requires_grad_(True)
            slices.freeze_neurons(parameter, part, frozen)
    return slices


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
