"""Bootstrap over rows: how much a score, or the difference of two, depends on which rows were drawn."""

from collections.abc import Callable
from typing import NamedTuple

import torch


DRAWS = 2000
_AT_ONCE = 2**22  # numbers of rows held at a time


class Interval(NamedTuple):
    """A value with its 95% interval.

    Attributes:
        value (`float`): on all rows.
        low (`float`): lower end of the interval.
        high (`float`): upper end.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def resampled_sums(rows: torch.Tensor, *, draws: int = DRAWS, seed: int = 0) -> torch.Tensor:
    """Sums over as many rows, drawn with replacement; the same seed draws the same ones of as many rows.

    Args:
        rows: what each row gives, shape (rows, numbers).
        draws: how often.
        seed: of the draws.

    Returns:
        Shape (draws, numbers), float64.
    """
    count = len(rows)
    rows = rows.double()
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _AT_ONCE // max(1, rows.numel()))
    parts = []
    for start in range(0, draws, step):
        chosen = torch.randint(count, (min(step, draws - start), count), generator=generator)
        parts.append(rows[chosen].sum(1))
    return torch.cat(parts)


def difference(
    value: Callable[[torch.Tensor], float],
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The difference of a score between two models on the same rows, by a paired bootstrap.

    Args:
        value: the score, given the sums over rows, shape (numbers,).
        before, after: what each row gives under either model, shape (rows, numbers).
        draws: bootstrap samples.
        seed: of their draws.
    """
    samples = [resampled_sums(rows, draws=draws, seed=seed) for rows in (before, after)]
    differences = [value(other) - value(one) for one, other in zip(*samples, strict=True)]
    whole = value(after.double().sum(0)) - value(before.double().sum(0))
    return _interval(whole, differences)


def spread(
    value: Callable[[torch.Tensor], float], rows: torch.Tensor, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """A score with its interval. See [`difference`]."""
    samples = resampled_sums(rows, draws=draws, seed=seed)
    return _interval(value(rows.double().sum(0)), [value(sums) for sums in samples])


def _interval(whole: float, samples: list[float]) -> Interval:
    drawn, places = torch.tensor(samples, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64)
    below, between = (drawn.quantile(places, interpolation=how) for how in ("lower", "linear"))
    # Between two infinite samples it would be NaN.
    return Interval(whole, *torch.where(below.isinf(), below, between).tolist())
