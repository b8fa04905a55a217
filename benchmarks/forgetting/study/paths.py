"""Paths of a cell, from base to trained: what was forgotten where a target is reached, of any arm, on any texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fnsft_trl.evaluation.equal_learning import Crossing, target

from .plan import BY_SCALES, BY_STEPS, GATE, LADDER, PRIMARY, TUNING_SEED
from .running import BASE


Cell = Mapping[str, Any]
Found = Mapping[tuple, Cell]

PATHS = (BY_STEPS, BY_SCALES)
TUNED = dict.fromkeys(GATE, LADDER)


@dataclass(frozen=True)
class Path:
    """
    Points from the base to a trained model.

    Attributes:
        losses (`tuple[float, ...]`): on the task, at each point.
        kl (`dict[str, np.ndarray]`): text -> KL of each of its articles at each point, summed over its tokens, shape
            (points, articles).
        tokens (`dict[str, np.ndarray]`): text -> tokens of each of its articles.
    """

    losses: tuple[float, ...]
    kl: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, cell: Cell, which: str) -> Path:
        """A path of a cell: over the `steps` of its training, or over `scales` of what it has changed."""
        points = list(cell["points"])
        if which == BY_SCALES:
            points = [points[0], *cell["also"]["interpolated"], points[-1]]
        texts = cell["retention"]
        kl = {name: np.array([point["kl_sums"][name] for point in points]) for name in texts}
        tokens = {name: np.array(text["sequence_tokens"], float) for name, text in texts.items()}
        return cls(tuple(point["learning"] for point in points), kl, tokens)

    def crossing(self, loss: float) -> Crossing:
        """Where it first reaches a loss."""
        return _crossing(self.losses, loss)

    def log_kl(self, loss: float, name: str, counts: np.ndarray | None = None) -> np.ndarray:
        """Logarithm of the KL per token on a text where the loss is first reached.

        Args:
            loss: the target.
            name: of the text.
            counts: how often each of its articles counts, shape (draws, articles); each once by default.

        Returns:
            Shape (draws,).
        """
        counts = np.ones((1, len(self.tokens[name]))) if counts is None else counts
        means = (self.kl[name] @ counts.T) / (counts @ self.tokens[name])  # (points, draws)
        return self.crossing(loss).log_kl(means)


@dataclass(frozen=True)
class At:
    """
    What an arm has forgotten at a target.

    Attributes:
        kl (`dict[str, float]` or `None`): text -> nats per token; `None` where the target is never reached.
        losses (`tuple[float, ...]`): of the path.
        learning_rate (`float`): of the arm.
        path (`str`): `steps` or `scales`.
    """

    kl: Mapping[str, float] | None
    losses: tuple[float, ...]
    learning_rate: float
    path: str

    @property
    def mean(self) -> float:
        """Mean over the primary texts, in nats per token; infinite where the target is never reached."""
        return math.inf if self.kl is None else sum(self.kl[name] for name in PRIMARY) / len(PRIMARY)

    @property
    def log_mean(self) -> float:
        """Mean over the primary texts of the logarithm: that of their geometric mean."""
        return math.inf if self.kl is None else sum(math.log(self.kl[name]) for name in PRIMARY) / len(PRIMARY)


@cache
def _crossing(losses: tuple[float, ...], loss: float) -> Crossing:
    return Crossing.find(losses, loss)


def at_target(cell: Cell, which: str, loss: float) -> At:
    """What a cell has forgotten where its path first reaches a loss."""
    path = Path.of(cell, which)
    kl = None
    if path.crossing(loss).is_reached:
        kl = {name: float(np.exp(path.log_kl(loss, name)[0])) for name in path.kl}
    return At(kl, path.losses, cell["learning_rate"], which)


def every_at(cells: Sequence[Cell], loss: float) -> list[At]:
    """The same of both paths of every cell."""
    return [at_target(cell, which, loss) for cell in cells for which in PATHS]


def of_arm(found: Found, task: str, arm: str, *, part: str, seed: int | None = None) -> list[Cell]:
    """The cells of an arm on a shift, by learning rate and seed."""
    cells = [cell for key, cell in sorted(found.items()) if key[:3] == (part, task, arm)]
    return [cell for cell in cells if seed is None or cell["seed"] == seed]


@dataclass(frozen=True)
class Levels:
    """
    What there is to learn on a shift.

    Attributes:
        base (`float`): loss of the base.
        demonstrated (`float`): L5, its loss after 5 demonstrations.
        best (`float`): L*, the least loss of full training and LoRA with the tuning seed.
    """

    base: float
    demonstrated: float
    best: float

    @classmethod
    def of(cls, found: Found, task: str, *, rates: Mapping[str, Sequence[float]] = TUNED) -> Levels | None:
        """Those of a shift; `None` until its cells are there.

        Args:
            found: the cells.
            task: the shift.
            rates: arm -> learning rates that count for L*; all of full training and LoRA by default.
        """
        (base,) = of_arm(found, task, BASE, part="choose") or [None]
        trained = [
            cell
            for arm, allowed in rates.items()
            for cell in of_arm(found, task, arm, part="choose", seed=TUNING_SEED)
            if cell["learning_rate"] in allowed
        ]
        if base is None or not trained:
            return None
        best = min(loss for cell in trained for which in PATHS for loss in Path.of(cell, which).losses)
        return cls(base["points"][0]["learning"], base["demonstrated"], best)

    def target(self, share: float) -> float:
        """The loss at which a share has been learnt."""
        return target(self.demonstrated, self.best, share)
