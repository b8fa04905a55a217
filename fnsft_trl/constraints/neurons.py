"""Which neurons of a model may change, and which are frozen."""

from collections.abc import Iterator

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons import NeuronSite, find_neuron_sites
from ..selection import NeuronMask


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


def frozen_by_site(model: nn.Module, trainable: NeuronMask) -> Iterator[tuple[NeuronSite, torch.Tensor]]:
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
