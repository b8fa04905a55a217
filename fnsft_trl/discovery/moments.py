"""Moments: mean and variance of every neuron, exact over any stream. Pure tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..compat.torch import exact


COLUMNS = 4096  # neurons that are worked on at a time where a temporary copy is needed, so that it stays in the cache
_LOST = 0.01  # share of a variance by which rounded statistics may miss it
_LAUNCH = 65_536  # neurons of which a product takes an accelerator about as long as it takes to ask for it


def strip_width(device: torch.device) -> int:
    """How many neurons are worked on at a time in each block of tokens, where a temporary copy is needed."""
    return COLUMNS if device.type == "cpu" else _LAUNCH


class Moments:
    """How many tokens there were, and mean and squared deviations of every neuron over them, in float64.

    Attributes:
        count (`int`): tokens.
        mean (`torch.Tensor`): shape (neurons,).
        m2 (`torch.Tensor`): shape (neurons,), sum of the squared deviations from the mean.
    """

    def __init__(self, count: int, mean: torch.Tensor, m2: torch.Tensor) -> None:
        self.count, self.mean, self.m2 = count, mean, m2

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Of no token yet."""
        zeros = exact(torch.zeros(width, device=device))
        return cls(0, zeros, zeros.clone())

    @classmethod
    def centring(cls, block: torch.Tensor) -> Moments:
        """The moments of a block of activations, from which the mean is then subtracted in place.

        Args:
            block: shape (tokens, neurons), finite; its squares need not be.
        """
        mean = block.mean(0)
        block.sub_(mean)
        squares = torch.cat([(strip * strip).sum(0) for strip in block.split(strip_width(block.device), 1)])
        m2 = exact(squares)
        too_large = ~squares.isfinite()
        if too_large.any():
            m2[too_large.to(m2.device)] = exact(block[:, too_large]).square().sum(0)
        return cls(len(block), exact(mean), m2)

    @classmethod
    def union(cls, parts: Sequence[Moments]) -> Moments:
        """Of all tokens together."""
        whole = cls(parts[0].count, parts[0].mean.clone(), parts[0].m2.clone())
        for part in parts[1:]:
            whole.add(part)
        return whole

    def add(self, other: Moments) -> None:
        """Take in the tokens of other moments."""
        count = self.count + other.count
        if count == 0:
            return
        difference = other.mean - self.mean
        self.m2 += other.m2 + difference.square() * (self.count * other.count / count)
        self.mean += difference * (other.count / count)
        self.count = count

    @property
    def variance(self) -> torch.Tensor:
        """Shape (neurons,)."""
        return self.m2 / self.count

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square, shape (neurons,)."""
        return (self.variance + self.mean.square()).sqrt()

    def stored(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and RMS of some neurons as a template keeps them, from which their variance can be had again.

        In float32. But in float64, where a neuron varies so little beside its mean that the difference would be lost:
        float32 misses 0.1% of a variance where the mean is a hundred times the deviation, 10% where a thousand times.
        """
        exact_ones = self.mean[columns].cpu(), self.rms[columns].cpu()
        mean, rms = (values.float() for values in exact_ones)
        variance = self.variance[columns].cpu()
        missed = rms.double().square() - mean.double().square() - variance
        return exact_ones if (missed.abs() > _LOST * variance).any() else (mean, rms)
