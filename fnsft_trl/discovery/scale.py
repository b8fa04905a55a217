"""The scale of loadings: what a loading of one is in the activations of each neuron of a template."""

import torch

from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate
from .moments import Moments
from .units import Units


def activation_scale(template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
    """What a loading of one is in activations, by which loadings become directions of activations.

    Loadings are in the units of the discovery (`ica_standardize`). Those of a z-scored template are in standard
    deviations of each neuron, and those by layers in the RMS of the layer. Those of a massive neuron are in what it
    was divided down to.
    Of statistics in float32, the deviation of a neuron is good to 0.1% where its mean is a hundred times as large, and
    to 15% where it is a thousand times. A discovery keeps such layers in float64.
    A direction is `loadings[layer][number] * activation_scale(template)[layer]`.

    Args:
        template: the networks.

    Returns:
        Layer -> shape (neurons,), float64. Ones where the template was converted from lists of neurons.

    Raises:
        FNSFTError: the loadings are cosines (`ica_decomposition: kmeans`), which are no directions; or the template
            does not know the scale of its neurons.
    """
    settings = template.settings
    if settings.get("ica_decomposition") == "kmeans":
        raise FNSFTError(
            "the loadings of a template of ica_decomposition=kmeans are cosines, which name neurons and no directions "
            "of their activations; discover with ica or pca"
        )
    standardize = settings.get("ica_standardize")
    if standardize is None:
        return {layer: torch.ones(width, dtype=torch.float64) for layer, width in template.widths.items()}
    if not template.rms:
        raise FNSFTError(
            f"the template has loadings by ica_standardize={standardize} and does not know the scale of its neurons; "
            "discover the networks again"
        )
    widths = list(template.widths.values())
    layers = [slice(sum(widths[:n]), sum(widths[: n + 1])) for n in range(len(widths))]
    mean, rms = (torch.cat([part[i].double() for i in template.widths]) for part in (template.mean, template.rms))
    moments = Moments(1, mean, (rms.square() - mean.square()).clamp_min(0))
    units = Units(standardize, settings.get("ica_drop_massive"), layers)
    divisor = units.divisor(moments)
    scale = divisor.masked_fill(divisor.isinf(), 0) / units.loading_unit(moments)
    return dict(zip(template.widths, scale.split(widths), strict=True))
