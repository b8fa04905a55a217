"""Recurrence: where the networks of one template are among those of another one of the same model."""

from typing import Any

from ..template.template import FunctionalNetworkTemplate
from .matching import SAME_NETWORK, match_components, overlap


def recurrence(template: FunctionalNetworkTemplate, other: FunctionalNetworkTemplate) -> list[dict[str, Any]]:
    """The network of another template of the same model that each network corresponds to.

    Networks are matched one to one by the correlation of their loadings.

    Args:
        template: the networks.
        other: where they are looked for; it has as many.

    Returns:
        For each network: `component`, the number of its counterpart; `correlation`, in [0, 1]; `iou`; and `recurs`,
        whether the IoU is above 0.2, the rule by which two networks count as the same.
    """
    (loadings, members), (other_loadings, other_members) = template.pooled(), other.pooled()
    partner, correlation = match_components(loadings, other_loadings)
    iou = overlap(members, other_members).gather(1, partner[:, None]).flatten()  # (networks,)
    return [
        {"component": number, "correlation": found, "iou": value, "recurs": value > SAME_NETWORK}
        for number, found, value in zip(partner.tolist(), correlation.tolist(), iou.tolist(), strict=True)
    ]
