"""LabelCount: how many batches held a label, without which there is nothing to learn and a loss of 0.0."""

from collections.abc import Mapping
from typing import Any

import torch


_IGNORED = -100


class LabelCount:
    """Counts batches of rows, and those among them without a single label.

    Attributes:
        batches (`int`): how many there were.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._empty: torch.Tensor | int = 0  # stays on its device, so that no step waits for it

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count one batch; one whose labels are not known is left out.

        Args:
            inputs: with `labels`, shape (..., tokens), of which the first of a row is no one's next token.
        """
        labels = inputs.get("labels")
        if isinstance(labels, torch.Tensor):
            self.batches += 1
            self._empty += ~(labels[..., 1:] != _IGNORED).any()

    @property
    def empty(self) -> int:
        """Number of batches without a label."""
        return int(self._empty)
