"""Comparisons over seeds and articles: a two-way bootstrap, exact sign-flip tests, Holm, equivalence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import FNSFTError
from ..finite import check_finite


DRAWS = 4000
EQUIVALENT = (0.8, 1.25)  # ratios that make no difference

_MOST = 20  # differences of which all signs are tried


@dataclass(frozen=True)
class Ratio:
    """
    A ratio with its intervals.

    Attributes:
        value (`float`): of all seeds and articles.
        interval (`tuple[float, float]`): of 95%.
        narrow (`tuple[float, float]`): of 90%, by which equivalence is judged.
        seeds (`int`): how many seeds it is over.
    """

    value: float
    interval: tuple[float, float]
    narrow: tuple[float, float]
    seeds: int

    @property
    def is_equivalent(self) -> bool:
        """Whether the 90% interval lies within [.8, 1.25]: two one-sided tests at 5%."""
        return EQUIVALENT[0] <= self.narrow[0] and self.narrow[1] <= EQUIVALENT[1]

    @classmethod
    def of_logs(cls, value: float, draws: np.ndarray, seeds: int) -> Ratio:
        """The ratio of which a logarithm and its draws are given.

        Raises:
            FNSFTError: one of them is NaN or infinite.
        """
        check_finite([value, *draws.tolist()], "logarithms of a ratio", "look at what is compared")
        low, high = np.quantile(draws, [0.025, 0.975])
        inner = np.quantile(draws, [0.05, 0.95])
        return cls(
            math.exp(value),
            (math.exp(low), math.exp(high)),
            (math.exp(inner[0]), math.exp(inner[1])),
            seeds,
        )


def two_way_draws(
    values: Callable[[np.ndarray], np.ndarray],
    seeds: int,
    articles: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, np.ndarray]:
    """A mean over seeds of something that articles make up, with both drawn anew.

    Seeds and articles are drawn independently of each other, each with replacement. What is compared is drawn
    together: give the difference of two arms on the same seeds and articles, and it is paired in both.

    Args:
        values: is given how often each article counts, those of all texts side by side, shape (draws, articles), and
            gives the value of every seed, shape (draws, seeds).
        seeds: how many there are.
        articles: how many there are of each text, which are drawn by themselves.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The value on all seeds and articles, and those of the draws, shape (draws,).
    """
    generator = np.random.default_rng(seed)
    whole = float(values(np.ones((1, sum(articles)))).mean())
    parts = [generator.multinomial(count, np.full(count, 1 / count), size=draws) for count in articles]
    chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, seeds)
    return whole, (values(np.concatenate(parts, 1).astype(float)) * chosen).sum(1)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of an exact test that differences lie symmetrically around 0: all their signs are tried.

    Five of them cannot have a p under .0625; differences of several tasks are pooled.

    Args:
        differences: one for each seed and task.

    Raises:
        FNSFTError: there are none, too many to try all signs, or one is NaN or infinite.
    """
    check_finite(differences, "differences of a test", "look at what is compared")
    if not 1 <= len(differences) <= _MOST:
        raise FNSFTError(f"an exact test of {len(differences)} differences; give 1 to {_MOST}")
    if len(differences) == 1:
        return 1.0
    # One number more than there are signs to try: all of them are.
    found = stats.permutation_test(
        (np.asarray(differences, float),), np.mean, permutation_type="samples", n_resamples=2 ** len(differences) + 1
    )
    return float(found.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number, as Holm (1979) does it: the r-th smallest of n times n - r + 1, monotone.

    Args:
        p_values: by the name of what was tested.

    Raises:
        FNSFTError: one is NaN.
    """
    check_finite(p_values.values(), "p values to be adjusted", "look at what was tested")
    found, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        found[name] = least
    return {name: found[name] for name in p_values}
