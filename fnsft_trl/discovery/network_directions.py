"""The directions of networks among the inputs of down projections."""

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.sites import find_neuron_sites
from ..template.template import FunctionalNetworkTemplate


def network_directions(
    template: FunctionalNetworkTemplate, layer: int, numbers: list[int], *, with_mean: bool = False
) -> torch.Tensor:
    """The directions of networks among a layer's activations, shape (networks, neurons), of any length.

    Loadings of a z-scored template are in standard deviations of each neuron, and are brought back to activations.

    Args:
        template: of neurons.
        layer: one of its layers.
        numbers: of the networks.
        with_mean: put the mean activations in front of them.

    Raises:
        FNSFTError: the template does not hold what is needed for that.
    """
    loadings = template.loadings[layer][numbers].double()
    is_scaled = template.settings.get("ica_standardize") == "zscore"
    if (is_scaled or with_mean) and layer not in template.mean:
        raise FNSFTError(
            "the template holds neither means nor scales of its neurons, so its networks have no directions; discover "
            "it again"
        )
    if is_scaled:
        variance = template.rms[layer].double().square() - template.mean[layer].double().square()
        loadings = loadings * variance.clamp_min(0).sqrt()
    return torch.cat([template.mean[layer].double()[None], loadings]) if with_mean else loadings


def directions_of_modules(
    template: FunctionalNetworkTemplate, model: nn.Module, numbers: list[int], *, with_mean: bool = False
) -> dict[str, torch.Tensor]:
    """Name of a down projection -> [`network_directions`] of its input.

    Raises:
        FNSFTError: the template is of another site, or has experts.
    """
    if template.site != "mlp_intermediate":
        raise FNSFTError(f"the template is of {template.site}; one of neurons (mlp_intermediate) is needed")
    return {
        site.down_name: network_directions(template, site.layer, numbers, with_mean=with_mean)
        for site in find_neuron_sites(model)
        if site.layer in template.loadings and not site.experts
    }
