"""The double dissociation: whether protecting the directions of one domain keeps this domain more than the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fnsft_trl.evaluation.paired import two_way_draws

from .paths import Found, Path
from .plan import BASES, BY_STEPS, DOMAINS, SEEDS
from .stages import dissociation, protecting


@dataclass(frozen=True)
class Dissociation:
    """
    I of a basis, or the difference of two.

    Attributes:
        value (`float`): mean over seeds, of logarithms of KL.
        interval (`tuple[float, float]`): of 95%.
        narrow (`tuple[float, float]`): of 90%.
    """

    value: float
    interval: tuple[float, float]
    narrow: tuple[float, float]

    @property
    def shown(self) -> str:
        """With its interval."""
        return f"{self.value:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"


def dissociations(found: Found) -> dict[str, Dissociation]:
    """I of every basis, and of networks less principal components, all at one loss for each seed.

    I = half of [ln KL_A(protect B) - ln KL_A(protect A) + ln KL_B(protect A) - ln KL_B(protect B)].
    """
    task = dissociation(found)[0].task
    paths: dict[tuple[str, str, int], Path] = {}
    for setting in dissociation(found):
        paths[setting.arm, task, setting.seed] = Path.of(found[setting.key], BY_STEPS)
    names = {basis: {domain: protecting(found, basis, domain) for domain in DOMAINS} for basis in BASES}
    losses = {seed: _common(paths, task, seed) for seed in SEEDS}
    every = list(paths.values())
    articles = [len(every[0].tokens[name]) for name in DOMAINS]
    ends = np.cumsum(articles)[:-1]

    def of_basis(basis: str, counts: np.ndarray) -> np.ndarray:
        parts = dict(zip(DOMAINS, np.split(counts, ends, axis=1), strict=True))
        return np.stack([_index(paths, names[basis], task, seed, losses[seed], parts) for seed in SEEDS], axis=1)

    wanted = {basis: (lambda counts, basis=basis: of_basis(basis, counts)) for basis in BASES}
    wanted["networks - pca"] = lambda counts: of_basis("networks", counts) - of_basis("pca", counts)
    found_of = {}
    for name, values in wanted.items():
        value, draws = two_way_draws(values, len(SEEDS), articles)
        ends95, ends90 = np.quantile(draws, [0.025, 0.975]), np.quantile(draws, [0.05, 0.95])
        found_of[name] = Dissociation(value, tuple(map(float, ends95)), tuple(map(float, ends90)))
    return found_of


def _common(paths: Mapping[tuple[str, str, int], Path], task: str, seed: int) -> float:
    """The least loss that every cell of a seed reaches."""
    own = [path for (_, of_task, of_seed), path in paths.items() if (of_task, of_seed) == (task, seed)]
    return max(path.crossing(-math.inf).least for path in own)


def _index(
    paths, arms: Mapping[str, str], task: str, seed: int, loss: float, counts: Mapping[str, np.ndarray]
) -> np.ndarray:
    """I of a seed, shape (draws,)."""
    total = 0.0
    for domain, counted in counts.items():
        for protected in DOMAINS:
            kl = paths[arms[protected], task, seed].log_kl(loss, domain, counted)
            total = total + (-kl if protected == domain else kl)
    return total / 2
