"""Which neurons of a model may change, and which are frozen."""

from collections.abc import Iterator

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import NeuronSite


def trainable_neurons(model: nn.Module, mask: NeuronMask, train: str) -> NeuronMask:
    """The neurons whose weights may change, over all layers of the model.

    Args:
        model: the model.
        mask: the selection; layers that it does not cover count as not selected.
        train: `"selected"`, `"unselected"` or `"all"`.

    Raises:
        FNSFTError: nothing, or with `"unselected"` everything, would be trained.
    """
    selected = mask.over({site.layer: site.width for site in fitting_sites(model, mask)})
    trainable = {"selected": selected, "unselected": ~selected, "all": selected | ~selected}[train]
    if trainable.count == 0:
        raise FNSFTError(
            f"train_neurons={train} leaves no neuron trainable, for the selection holds {mask.count}; select others"
        )
    if train == "unselected" and selected.count == 0:
        raise FNSFTError("train_neurons=unselected with an empty selection freezes nothing; select some neurons")
    return trainable


def frozen_by_site(model: nn.Module, trainable: NeuronMask) -> Iterator[tuple[NeuronSite, torch.Tensor]]:
    """(site, numbers of its frozen neurons) for every site of the model."""
    sites = fitting_sites(model, trainable)
    trainable = trainable.over({site.layer: site.width for site in sites})
    for site in sites:
        yield site, (~trainable.layers[site.layer]).nonzero().flatten()
