"""What left training: which neurons differ between two sets of weights."""

from collections.abc import Mapping, Sequence

import torch

from .neurons import NeuronSite
from .selection import NeuronMask


def changed_neurons(
    sites: Sequence[NeuronSite], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[NeuronMask, list[str]]:
    """Compare two sets of weights of one model, bit by bit.

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
