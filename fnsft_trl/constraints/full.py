"""Full fine-tuning held to a NeuronMask.

Gradients of frozen slices are zeroed as they are accumulated, so that clipping does not count them. The slices are put
back after every step, so that weight decay does not move them either.
"""

from collections.abc import Iterator

import torch
from torch import nn

from ..compat.peft import BaseTunerLayer
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model
from .frozen import FrozenSlices, check_freezable
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

    Raises:
        FNSFTError: see [`check_freezable`]; nothing is frozen then.
    """
    parts = [part for part in _parts(model, ~frozen) if part[0].tensor(model).requires_grad]
    for part, neurons in parts:
        slices.freeze_neurons(model, part, neurons, for_a_while=True)


def constrain_full(model: nn.Module, trainable: NeuronMask, *, train_other: bool) -> FrozenSlices:
    """Hold full fine-tuning to a set of neurons.

    Sets `requires_grad` of every parameter, and masks the gradients of those that are frozen in part. To be called
    when the model is on its device; the caller attaches the result to the optimizer. A model is held to one set at a
    time: a second call takes the place of the first. Weights may be loaded into the model before or after it.

    Args:
        model: a transformers model without adapters, not quantised.
        trainable: the neurons that may change.
        train_other: whether the weights that belong to no neuron (attention, norms, embeddings, the bias of the down
            projection) train too.

    Raises:
        FNSFTError: the mask was made for another model; the model has adapters, is quantised or offloaded, or its
            experts are sharded. The model is left as it was.
    """
    base = base_model(model)
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise FNSFTError(
            f"{adapted} carries an adapter; merge it (merge_and_unload) and constrain the model that this gives, or "
            "use constrain_lora"
        )
    parts = list(_parts(model, trainable))
    slices = FrozenSlices()
    slices.take_over([base])
    model.requires_grad_(train_other)
    for part, frozen in parts:
        part.tensor(model).requires_grad_(True)
        slices.freeze_neurons(model, part, frozen)
    return slices


def _parts(model: nn.Module, trainable: NeuronMask) -> Iterator[tuple[WeightSlice, torch.Tensor]]:
    """(where a parameter holds neurons, numbers of the site's frozen neurons), checked to be trainable."""
    for site, frozen in frozen_by_site(model, trainable):
        for part in site.layout.slices:
            parameter = part.tensor(model)
            if not parameter.is_floating_point():
                raise FNSFTError(
                    f"{part.module_name} is quantised, so its weights cannot be trained; use "
                    "train_method=neuron_delta or lora"
                )
            if parameter.is_meta:
                raise FNSFTError(f"{part.full_name} is offloaded; load the model without, so that it can be trained")
            check_freezable(parameter, part.dims)
            yield part, frozen


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
