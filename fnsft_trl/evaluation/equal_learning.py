"""Equal learning: how far a model is from its base at the point where it has learnt as much as others.

Two ways to train differ in how much they learn, so what they forget is compared where both have learnt the same. A
target is a share of what there is to learn. What was forgotten is read off where the loss first reaches it, on the
path of a training or by interpolation from base to trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from ..errors import FNSFTError
from ..finite import check_finite


LEAST_KL = 1e-7  # nats: what is less is rounding, and has no logarithm that says anything


def target(demonstrated: float, best: float, share: float) -> float:
    """The loss at which a share of what there is to learn has been learnt: tau_q = L5 - q (L5 - L*).

    Args:
        demonstrated: L5, loss of the base model that is shown some demonstrations: what needs no training.
        best: L*, the least loss that training reaches.
        share: q, in (0, 1].

    Raises:
        FNSFTError: training reaches no less than demonstrations do, or the share is none.
    """
    if not 0 < share <= 1:
        raise FNSFTError(f"a share of what is learnt is {share:g}; give one in (0, 1]")
    if not best < demonstrated:
        raise FNSFTError(
            f"the best training ends at {best:.4f} nats and the base with demonstrations at {demonstrated:.4f}: there "
            "is nothing that only training teaches; take a task that is new to the model"
        )
    return demonstrated - share * (demonstrated - best)


@dataclass(frozen=True)
class Crossing:
    """
    Where a path first reaches a target.

    Attributes:
        before (`int` or `None`): number of the point before it; `None` where the path never reaches the target.
        share (`float`): how far from this point to the next one, in (0, 1].
        least (`float`): the least loss of the path, made monotone.
    """

    before: int | None
    share: float
    least: float

    @classmethod
    def find(cls, losses: Sequence[float], loss: float) -> Crossing:
        """The first crossing of the losses of a path, made monotone by isotonic regression.

        Args:
            losses: at each point of the path, that of the base first.
            loss: the target; -inf is never reached.

        Raises:
            FNSFTError: there are fewer than two points, the base has reached the target already, or a loss is NaN or
                infinite.
        """
        check_finite(losses, "losses of a path", "look at what was measured")
        if math.isnan(loss):
            raise FNSFTError("the target of a path is NaN; give a loss, or -inf to learn only the least one")
        if len(losses) < 2:
            raise FNSFTError(f"a path has {len(losses)} points; give at least the base and the trained model")
        fitted = isotonic_regression(np.asarray(losses, float), increasing=False).x
        least = float(fitted[-1])
        if fitted[0] <= loss:
            raise FNSFTError(f"the base has a loss of {fitted[0]:.4f}, which reaches {loss:.4f} without any training")
        if least > loss:
            return cls(None, 0.0, least)
        after = int(np.argmax(fitted <= loss))
        share = (fitted[after - 1] - loss) / (fitted[after - 1] - fitted[after])
        return cls(after - 1, float(share), least)

    @property
    def is_reached(self) -> bool:
        """Whether the path reaches the target."""
        return self.before is not None

    def log_kl(self, kl: np.ndarray) -> np.ndarray:
        """Logarithm of the KL at the crossing: linear in the loss between the points beside it.

        From the base, whose KL is 0, it grows with the square of what was learnt, as it does for small changes.

        Args:
            kl: at each point of the path, in nats, shape (points, ...).

        Returns:
            Shape (...).

        Raises:
            FNSFTError: the path never reaches the target, or a KL is NaN or infinite.
        """
        check_finite(np.ravel(kl).tolist(), "KL along a path", "look at what was measured")
        if self.before is None:
            raise FNSFTError("the path never reaches the target, so there is no KL at it; report it as not reached")
        logs = np.log(np.maximum(np.asarray(kl, float), LEAST_KL))
        after = logs[self.before + 1]
        if self.before == 0:
            return np.maximum(after + 2 * math.log(self.share), math.log(LEAST_KL))
        return (1 - self.share) * logs[self.before] + self.share * after


def kl_at(losses: Sequence[float], kl: Sequence[float], loss: float) -> float | None:
    """KL where a path first reaches a loss, in nats; `None` where it never does.

    Args:
        losses, kl: at each point of the path, that of the base first.
        loss: the target.
    """
    crossing = Crossing.find(losses, loss)
    return float(np.exp(crossing.log_kl(np.asarray(kl, float)))) if crossing.is_reached else None
