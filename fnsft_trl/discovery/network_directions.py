"""The directions of a template's networks among the activations that they were found in."""

from collections.abc import Sequence

import torch

from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate
from .scale import activation_scale


def network_directions(template: FunctionalNetworkTemplate, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Where networks send activations: their loadings, in units of the activations.

    Args:
        template: of the site `mlp_intermediate`, whose activations are the inputs of the down projections.
        numbers: of networks.

    Returns:
        Layer -> directions, shape (networks, neurons), float64.

    Raises:
        FNSFTError: the template is of another site; or see [`~fnsft_trl.discovery.scale.activation_scale`].
    """
    if template.site != "mlp_intermediate":
        raise FNSFTError(f"the template is of {template.site}; one of neurons (mlp_intermediate) is needed")
    scale = activation_scale(template)
    return {layer: rows[list(numbers)].double() * scale[layer] for layer, rows in template.loadings.items()}
