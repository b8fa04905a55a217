"""The directions of a template's networks among the activations that they were found in."""

from collections.abc import Sequence

import torch

from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate


def network_directions(template: FunctionalNetworkTemplate, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Where networks send activations: their loadings, in units of the activations.

    Loadings of a z-scored template are in standard deviations of each neuron.

    Args:
        template: of the site `mlp_intermediate`, whose activations are the inputs of the down projections.
        numbers: of networks.

    Returns:
        Layer -> directions, shape (networks, neurons), float64.

    Raises:
        FNSFTError: the template is of another site; or it is z-scored and holds no scales.
    """
    if template.site != "mlp_intermediate":
        raise FNSFTError(f"the template is of {template.site}; one of neurons (mlp_intermediate) is needed")
    found = {layer: loadings[list(numbers)].double() for layer, loadings in template.loadings.items()}
    if template.settings.get("ica_standardize") != "zscore":
        return found
    if missing := found.keys() - template.rms.keys():
        raise FNSFTError(
            f"the template is z-scored and holds no scale of the neurons of layer {min(missing)}; discover it again"
        )
    for layer, directions in found.items():
        variance = template.rms[layer].double().square() - template.mean[layer].double().square()
        directions *= variance.clamp_min(0).sqrt()
    return found
