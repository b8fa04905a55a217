"""Budget: how much retention a run may lose, and the last state of its weights that kept to it."""

from collections.abc import Iterable
from numbers import Real

import torch
from torch import nn

from ..errors import FNSFTError
from ..evaluation.series import RetentionSeries


ACTIONS = ("rollback", "stop", "warn")


class RetentionBudgetExceeded(FNSFTError):
    """No state of a run kept to its budget: its model is what it was before the training."""


class Budget:
    """The rise of cross-entropy that no retention text may pass.

    Args:
        nats (`float`): nats per token.
        action (`str`): what is done when a text passes it: `rollback` ends the training and puts the last state back
            that kept to it, `stop` ends it, `warn` goes on.

    Attributes:
        kept_step (`int` or `None`): the step of the state that is kept for a rollback.

    Raises:
        FNSFTError: it is no budget, or there is no such action.
    """

    def __init__(self, nats: float, action: str = "rollback") -> None:
        if not isinstance(nats, Real) or not 0 <= nats < float("inf"):
            raise FNSFTError(f"the budget of retention is {nats!r}; it must be a number of nats, at least 0")
        if action not in ACTIONS:
            raise FNSFTError(f"on_budget is {action!r}; it must be one of: {', '.join(ACTIONS)}")
        self.nats = nats
        self.action = action
        self.kept_step: int | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def passed_by(self, series: Iterable[RetentionSeries]) -> list[RetentionSeries]:
        """The series whose rise is over the budget, or is no number."""
        return [each for each in series if not each.values.get("rise", 0.0) <= self.nats]

    def keep(self, model: nn.Module, step: int) -> None:
        """Keep a copy of what trains, on the CPU, in the place of the one kept before; only for a rollback."""
        if self.action != "rollback":
            return
        for name, parameter in model.named_parameters():
            if name in self._kept:
                self._kept[name].copy_(parameter.detach())
            elif parameter.requires_grad:
                self._kept[name] = parameter.detach().to("cpu", copy=True)
        self.kept_step = step

    def restore(self, model: nn.Module) -> None:
        """Put the kept copy back, bit for bit."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._kept:  # an adapter that has been loaded again requires no gradients
                    parameter.copy_(self._kept[name])

    def forget(self) -> None:
        """Free the copy."""
        self._kept.clear()
