"""Condition: one intervention that a probe scores a model under, and what it stands for."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..neurons.mask import NeuronMask


@dataclass(frozen=True, eq=False)
class Condition:
    """One intervention.

    Attributes:
        curve (`str`): what it belongs to: `lesion` (of one network), `union` (of the first m), `dose` (of a share of
            all neurons), `preserve` (of a share), `amplify`, or `kept` (all but the networks
            silenced), `prune` and `cut` (the same in the inner layers, to the mean and to zero), `neuron` (one of
            them), or `full` (all neurons silenced).
        selector (`str`): `networks`, or which control.
        network (`str` or `None`): the network that it is about, or that the control is like.
        point (`float`): where on the curve: number of networks, share of neurons, factor; 0 without one.
        draw (`int`): number of a control's draw.
        mask (`NeuronMask`): the neurons that are changed.
        factor (`float` or `None`): what their activations are multiplied by; `None` silences them.
        ablation (`str` or `None`): what stands in for silenced neurons, `zero` or `mean`; by default as the
            probe has it.
        about (`dict`): what else is known of the mask, as JSON values.
    """

    curve: str
    selector: str
    network: str | None
    point: float
    draw: int
    mask: NeuronMask = field(repr=False)
    factor: float | None = None
    ablation: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """What tells it from others with the same effect: neurons and factor, as a hash."""
        return hashlib.sha256(f"{self.mask.sha256}:{self.factor}:{self.ablation}".encode()).hexdigest()[:20]

    def to_dict(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        return {
            "curve": self.curve,
            "selector": self.selector,
            "network": self.network,
            "point": self.point,
            "draw": self.draw,
            "neurons": self.mask.count,
            "key": self.key,
            **self.about,
        }
