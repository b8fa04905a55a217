"""Directions that a template gives of the inputs of a model's linear modules: of its networks, and of what it kept."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.sites import base_model, find_neuron_sites
from ..template.template import FunctionalNetworkTemplate
from .directions import InputDirections, KeptDirections
from .network_directions import network_directions


def directions_of_modules(
    template: FunctionalNetworkTemplate, model: nn.Module, numbers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The mean activations of a layer and the directions of networks, by the down projection that is given them.

    Args:
        template: of neurons.
        model: plain or in a `PeftModel`.
        numbers: of networks.

    Returns:
        Name of a down projection in the base model -> directions of any length, shape (1 + networks, neurons),
        float64; none of layers with experts.

    Raises:
        FNSFTError: the template is of another site, or holds no means.
    """
    directions = network_directions(template, numbers)
    if not template.mean:
        raise FNSFTError(
            "the template holds no means of its neurons, along which networks are to be protected; discover it again"
        )
    return {
        site.down_name: torch.cat([template.mean[site.layer].double()[None], directions[site.layer]])
        for site in find_neuron_sites(base_model(model))
        if site.layer in directions and not site.experts
    }


def template_basis(template: FunctionalNetworkTemplate, model: nn.Module) -> KeptDirections | None:
    """The directions that a template holds of the inputs of MLPs' projections (`ica_store_basis`); `None` without.

    Args:
        template: of the model.
        model: plain or in a `PeftModel`.
    """
    if not template.basis:
        return None
    inputs = []
    for site in find_neuron_sites(base_model(model), kind=template.site):
        if site.layer in template.basis:
            for side, modules in (("basis", (site.down_name,)), ("input_basis", site.up_names)):
                basis = template.basis[site.layer][side].double().T.contiguous()
                inputs.append(InputDirections(modules, basis, torch.zeros(len(basis), dtype=torch.float64)))
    return KeptDirections(tuple(inputs))
