"""Units: what the activations of each neuron are divided by before directions are looked for. Pure tensors.

Whatever the neurons' scales are, no neuron is so strong in these units that the others drown in its rounding errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .moments import Moments


_SHARE, _LEAST = 0.01, 8  # of the neurons this share, or this many, can be massive: they are few
_PLAIN = 2.0**20  # activations smaller and larger than this on average are brought to about 1


@dataclass(frozen=True)
class Units:
    """The units of a discovery.

    Z-scored, each neuron is divided by its standard deviation. Centred, neurons keep their scale, so that those that
    vary more count more. *Massive* neurons vary more than all weaker ones together. They are divided down to vary as
    much as the weaker ones together, and count for no more than them. By layers, each layer is divided by its RMS:
    that of its activations less their means, over all neurons that vary. So all layers count alike, and neurons keep
    their scale within them. Massive is then what varies more than all weaker neurons of its layer.

    Attributes:
        standardize (`str`): `"center"`, `"layer"` or `"zscore"`.
        drop_massive (`float` or `None`): neurons whose RMS is more than this many times the median of their layer are
            left out.
        layers (`Sequence[slice]`): the neurons of each layer, which `drop_massive` and `"layer"` need.
    """

    standardize: str = "center"
    drop_massive: float | None = None
    layers: Sequence[slice] = ()

    def excluded(self, moments: Moments) -> torch.Tensor:
        """Which neurons are left out: bool, shape (neurons,)."""
        rms = moments.rms
        excluded = torch.zeros_like(rms, dtype=torch.bool)
        if self.drop_massive is not None:
            for columns in self.layers:
                excluded[columns] = rms[columns] > self.drop_massive * rms[columns].median()
        return excluded

    def massive(self, moments: Moments) -> torch.Tensor:
        """Which neurons are divided down, for they vary more than all weaker ones: bool, shape (neurons,)."""
        variance = moments.variance.masked_fill(self.excluded(moments), 0)
        massive = torch.zeros_like(variance, dtype=torch.bool)
        for columns in self._groups(variance):
            massive[columns] = variance[columns].sqrt() > _limit(variance[columns])
        return massive

    def divisor(self, moments: Moments) -> torch.Tensor:
        """What activations are divided by: float64, shape (neurons,); infinite for those that are left out."""
        excluded = self.excluded(moments)
        variance = moments.variance.masked_fill(excluded, 0)
        deviation = variance.sqrt()
        if self.standardize == "zscore":
            divisor = torch.where(deviation > 0, deviation, 1)
        else:
            divisor = torch.empty_like(deviation)
            for columns in self._groups(variance):
                limit, unit = _limit(variance[columns]), self.loading_unit(moments)
                if self.standardize == "layer":
                    unit = _typical(variance[columns], limit)
                divisor[columns] = (deviation[columns] / limit).clamp_min(1) * unit
        return divisor.masked_fill(excluded, math.inf)

    def running_divisor(self, moments: Moments) -> torch.Tensor:
        """As [`divisor`], on the way: neurons that would be left out are made like the others, for they may return."""
        divisor, deviation = self.divisor(moments), moments.variance.sqrt()
        excluded = divisor.isinf()
        if not excluded.any():
            return divisor
        inside = (deviation / divisor)[~excluded & (deviation > 0)]
        typical = inside.square().mean().sqrt() if len(inside) else torch.ones_like(deviation[0])
        return torch.where(excluded & (deviation > 0), deviation / typical, divisor.masked_fill(excluded, 1))

    def loading_unit(self, moments: Moments) -> float:
        """What loadings that were found in these units are multiplied by, so that those of the centred are in those of
        the activations (of a massive neuron: of the activations divided down)."""
        if self.standardize != "center":
            return 1.0
        variance = moments.variance.masked_fill(self.excluded(moments), 0)
        typical = _typical(variance, _limit(variance))
        # A power of two, by which dividing changes no bit of the result.
        return 1.0 if 1 / _PLAIN < typical < _PLAIN else 2.0 ** round(math.log2(typical))

    def _groups(self, variance: torch.Tensor) -> Sequence[slice]:
        """The neurons among which some can be massive: all together, those of each layer, or none."""
        return {"center": (slice(0, len(variance)),), "layer": self.layers, "zscore": ()}[self.standardize]


def _typical(variance: torch.Tensor, limit: torch.Tensor) -> float:
    """The RMS of neurons of these variances, of those that vary, none of them above the limit; 1 where none does."""
    varying = variance[variance > 0].clamp_max(float(limit) ** 2)
    return float(varying.mean().sqrt()) if len(varying) else 1.0


def _limit(variance: torch.Tensor) -> torch.Tensor:
    """The largest standard deviation that a neuron may have; infinite where none is massive."""
    varying = int((variance > 0).sum())
    most = min(max(_LEAST, int(_SHARE * varying)), varying // 2)
    if most == 0:
        return torch.full_like(variance[0], math.inf)
    strongest = variance.topk(most)
    others = variance.index_fill(0, strongest.indices, 0).sum()
    # No differences of sums: beside the variance of a massive neuron, those of the others would be rounded away.
    weaker = torch.cat([strongest.values[1:].flip(0).cumsum(0).flip(0), torch.zeros_like(others)[None]]) + others
    massive = (strongest.values > weaker).nonzero().flatten()
    return weaker[massive[-1]].sqrt() if len(massive) else torch.full_like(others, math.inf)
