"""How alike two networks are: overlap of their neurons, correlation of their loadings."""

from typing import Any

import torch

from .decomposition import match_components
from .template import FunctionalNetworkTemplate


SAME_NETWORK = 0.2  # IoU above which two networks count as the same


def pooled(template: FunctionalNetworkTemplate) -> tuple[torch.Tensor, torch.Tensor]:
    """Loadings and memberships of all networks, the layers side by side: both of shape (components, neurons)."""
    members = [torch.cat(list(template.members(c).values())) for c in range(len(template.components))]
    return torch.cat(list(template.loadings.values()), 1), torch.stack(members)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every network of `a` with every one of `b`.

    Args:
        a, b: bool, shapes (m, neurons) and (n, neurons).

    Returns:
        Shape (m, n), in [0, 1]; 0 where both are empty.
    """
    a, b = a.float(), b.float()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return both / either.clamp_min(1)


def recurrence(template: FunctionalNetworkTemplate, number: int, other: FunctionalNetworkTemplate) -> dict[str, Any]:
    """The network of another template of the same model that a network corresponds to.

    Networks are matched one to one by the correlation of their loadings.

    Args:
        template, number: the network.
        other: the template that it is looked for in.

    Returns:
        `component`, its number there; `correlation`, in [0, 1]; `iou`; and `recurs`, whether the IoU is above 0.2, the
        rule by which two networks count as the same.
    """
    loadings, members = pooled(template)
    other_loadings, other_members = pooled(other)
    partner, correlation = match_components(loadings, other_loadings)
    match = int(partner[number])
    iou = float(overlap(members[[number]], other_members[[match]]))
    return {
        "component": match,
        "correlation": float(correlation[number]),
        "iou": iou,
        "recurs": iou > SAME_NETWORK,
    }
