"""Which component is which: how alike two are, and one-to-one matching. Pure tensors."""

import torch
from scipy.optimize import linear_sum_assignment

from ..finite import check_finite


SAME_NETWORK = 0.2  # IoU above which two networks count as the same


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


def dice(iou: float) -> float:
    """Dice's coefficient (twice the intersection over the sum of the sizes) from the intersection over union."""
    return 2 * iou / (1 + iou)


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|correlation| of every row of `a` with every row of `b`.

    Args:
        a, b: shapes (m, values) and (n, values).

    Returns:
        Shape (m, n), in [0, 1]; 0 where a row is constant.
    """
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-30) for x in (a, b))
    return (a @ b.T).abs().clamp_max(1)


def match_rows(values: torch.Tensor) -> torch.Tensor:
    """One-to-one matching of rows with columns by |correlation| (Hungarian algorithm).

    The sum that is largest is that of the information which two normal variables of this correlation share, so that
    one near-perfect pair is worth more than two fair ones.

    Args:
        values: shape (m, n), in [0, 1].

    Returns:
        For each row its column, -1 for rows left over (m > n), shape (m,).

    Raises:
        FNSFTError: a value is NaN or infinite.
    """
    check_finite(values.flatten().tolist(), "correlations of networks", "look at what they were found on")
    information = -torch.log1p(-values.double().square().clamp_max(1 - 1e-12))
    rows, columns = linear_sum_assignment(information.numpy(), maximize=True)
    partner = torch.full((len(values),), -1)
    partner[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return partner


def match_components(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One-to-one matching of components by the correlation of their loadings.

    Args:
        a, b: loadings, shapes (m, neurons) and (n, neurons), m <= n.

    Returns:
        For each component of `a`, the index of its partner in `b`, shape (m,), and their |correlation|.
    """
    values = correlation(a, b)
    partner = match_rows(values)
    return partner, values[torch.arange(len(a)), partner]
