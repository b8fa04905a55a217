"""BatchCount: how many batches held a label, and gave a loss that is a number."""

from collections.abc import Mapping
from typing import Any

import torch


_IGNORED = -100


class BatchCount:
    """Counts batches of rows: those without a single label, from which nothing is learnt, and those of a broken loss.

    Attributes:
        batches (`int`): how many there were whose labels are known.
    """

    def __init__(self) -> None:
        self.batches = 0
        # They stay on their device, so that no step waits for them.
        self._empty: torch.Tensor | int = 0
        self._broken: torch.Tensor | int = 0

    def add(self, inputs: Mapping[str, Any] | list) -> None:
        """Count one batch; one without labels of tokens (preferences, prompts, classes) is left out.

        Args:
            inputs: with `labels`, shape (rows, tokens), of which the first of a row is no one's next token.
        """
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if isinstance(labels, torch.Tensor) and labels.dim() > 1:
            self.batches += 1
            self._empty += ~(labels[..., 1:] != _IGNORED).any()

    def add_loss(self, loss: torch.Tensor) -> None:
        """Count the loss of a batch, if it is not finite."""
        self._broken += ~loss.isfinite().all()

    def totals(self, trainer) -> tuple[int, int, int]:
        """The number of batches, of those without a label, and of losses that are not finite, over all processes."""
        counts = torch.tensor([self.batches, int(self._empty), int(self._broken)], device=trainer.args.device)
        return tuple(trainer.accelerator.reduce(counts, "sum").tolist())
