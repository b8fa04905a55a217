"""Comparisons of two arms at equal learning, over seeds of several shifts and articles of the primary texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fnsft_trl.evaluation.paired import Ratio, sign_flip, two_way_draws

from .paths import Found, Levels, Path, of_arm
from .plan import PRIMARY
from .stages import CONFIRM, best_of


@dataclass(frozen=True)
class Run:
    """
    A cell of the confirmation on the path that was chosen for its arm.

    Attributes:
        task (`str`): the shift.
        seed (`int`): of the cell.
        path ([`Path`]): its points.
        loss (`float`): the target of the shift.
    """

    task: str
    seed: int
    path: Path
    loss: float

    @property
    def is_reached(self) -> bool:
        """Whether it has learnt enough."""
        return self.path.crossing(self.loss).is_reached

    def log_kl(self, counts: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Mean over the primary texts of ln KL at the target, shape (draws,)."""
        parts = counts or [None] * len(PRIMARY)
        return sum(self.path.log_kl(self.loss, *pair) for pair in zip(PRIMARY, parts, strict=True)) / len(PRIMARY)


@dataclass(frozen=True)
class Comparison:
    """
    How much an arm forgets beside others, one for each shift.

    Attributes:
        arm (`str`): the arm.
        others (`dict[str, str]`): shift -> what it is compared with.
        ratio ([`Ratio`] or `None`): of the KLs at the target; `None` where no pair has one.
        differences (`tuple[float, ...]`): of ln KL, of each pair.
        pairs (`int`): seeds of all shifts.
        missed (`tuple[int, int]`): in how many of them the arm, and the other, never reach the target.
        p (`float`): of the sign-flip test; 1 where no pair has a difference.
    """

    arm: str
    others: Mapping[str, str]
    ratio: Ratio | None
    differences: tuple[float, ...]
    pairs: int
    missed: tuple[int, int]
    p: float

    @property
    def has_enough(self) -> bool:
        """Whether at least four pairs of five have a ratio."""
        return len(self.differences) >= math.ceil(0.8 * self.pairs) and self.ratio is not None


def runs(found: Found, task: str, arm: str, share: float, *, like: str | None = None) -> list[Run]:
    """The confirming cells of an arm on a shift, by seed.

    Args:
        found: all cells.
        task: the shift.
        arm: the arm.
        share: of what there is to learn: the target.
        like: the shift on which the arm's path was chosen; the same by default.
    """
    which = best_of(found, like or task, arm).path
    loss = Levels.of(found, task).target(share)
    cells = of_arm(found, task, arm, part=CONFIRM)
    return [Run(task, cell["seed"], Path.of(cell, which), loss) for cell in cells]


def compare(arm: str, others: Mapping[str, str], pairs: Sequence[tuple[Run, Run]]) -> Comparison:
    """Compare runs that are paired by shift and seed.

    Args:
        arm: of the first of each pair.
        others: shift -> arm of the second.
        pairs: of runs on the same texts.
    """
    missed = tuple(sum(not pair[side].is_reached for pair in pairs) for side in (0, 1))
    both = [(a, b) for a, b in pairs if a.is_reached and b.is_reached]
    if not both:
        return Comparison(arm, others, None, (), len(pairs), missed, 1.0)
    differences = tuple(float(a.log_kl()[0] - b.log_kl()[0]) for a, b in both)
    articles = [len(both[0][0].path.tokens[name]) for name in PRIMARY]
    ends = np.cumsum(articles)[:-1]

    def values(counts: np.ndarray) -> np.ndarray:
        parts = np.split(counts, ends, axis=1)
        return np.stack([a.log_kl(parts) - b.log_kl(parts) for a, b in both], axis=1)

    value, draws = two_way_draws(values, len(both), articles)
    ratio = Ratio.of_logs(value, draws, len(both))
    return Comparison(arm, others, ratio, differences, len(pairs), missed, sign_flip(differences))


def paired(found: Found, arm: str, others: Mapping[str, str], share: float, *, like: str | None = None) -> Comparison:
    """Compare an arm with another one on each of some shifts, over the seeds that both have.

    Args:
        found: all cells.
        arm: the arm.
        others: shift -> the other one.
        share: of what there is to learn.
        like: as in [`runs`].
    """
    pairs = []
    for task, other in others.items():
        first, second = ({run.seed: run for run in runs(found, task, each, share, like=like)} for each in (arm, other))
        pairs += [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return compare(arm, others, pairs)
