"""Statistics of a probe: effects with their intervals, and whether a network's is stronger than that of its controls.

A network is compared with D draws of a control. If it were nothing but one more draw, its effect, standardised by mean
and deviation of the draws, would be distributed as that of each draw by the others. So these values, of the draws of
all K networks together, are the null distribution: p = (1 + how many of them reach the network's) / (1 + K D). The p
values of the networks are then adjusted by Holm. Draws of different networks must be drawn by different seeds: K times
the same D draws are a null distribution of D values alone. With D = 20 the smallest adjusted p is below 1 / 20 for any
K; fewer draws can tell nothing at 5%.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..evaluation.paired import holm
from ..finite import check_finite


DRAWS = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Sums:
    """What a condition gives, summed over the items of each unit (row).

    Attributes:
        values (`np.ndarray`): shape (units,).
        counts (`np.ndarray`): of what they are sums, shape (units,).

    Raises:
        FNSFTError: a sum is NaN or infinite.
    """

    values: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        check_finite(self.values.tolist(), "sums that a condition of a probe gives")

    @property
    def mean(self) -> float:
        """Over all units."""
        return float(self.values.sum() / self.counts.sum())


@dataclass(frozen=True)
class Comparison:
    """A network beside the draws of one control.

    Attributes:
        control (`str`): which.
        draws (`int`): how many.
        mean (`float`): of their effects.
        highest (`float`): of them.
        difference (`float`): effect of the network less their mean.
        interval (`tuple[float, float]`): of 95%, of the difference, over units and draws.
        p (`float` or `None`): see above; `None` for a control that has one mask alone, or the same ones for all
            networks.
        adjusted (`float` or `None`): of Holm, over the networks.
    """

    control: str
    draws: int
    mean: float
    highest: float
    difference: float
    interval: tuple[float, float]
    p: float | None
    adjusted: float | None = None

    @property
    def is_stronger(self) -> bool:
        """Whether the network is: by the adjusted p, or without one by the interval over units and draws."""
        return self.interval[0] > 0 if self.p is None else self.adjusted is not None and self.adjusted < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"stronger": self.is_stronger}


def effect(after: Sums, before: Sums) -> float:
    """How much a mean rises."""
    return after.mean - before.mean


def spread(after: Sums, before: Sums, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of an effect, by a bootstrap over units."""
    weights = _weights(len(after.values), draws, seed)
    found = (weights @ (after.values - before.values)) / (weights @ before.counts)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def compare(
    networks: Mapping[str, Sums],
    controls: Mapping[str, Sequence[Sums]],
    name: str,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    are_shared: bool = False,
) -> dict[str, Comparison]:
    """Every network beside the draws of a control of its own.

    Args:
        networks: label -> what its lesion gives.
        controls: label -> what each draw gives.
        name: of the control.
        draws: of the bootstrap.
        seed: of the bootstrap.
        are_shared: whether all networks have the same draws, which have no p then: see above.
    """
    effects = {label: sums.mean for label, sums in networks.items()}
    drawn = {label: np.array([sums.mean for sums in controls[label]]) for label in networks}
    p_values = {} if are_shared and len(networks) > 1 else p_of_draws(effects, drawn)
    adjusted = holm(p_values) if p_values else {}
    found = {}
    for label, sums in networks.items():
        found[label] = Comparison(
            control=name,
            draws=len(drawn[label]),
            mean=float(drawn[label].mean()),
            highest=float(drawn[label].max()),
            difference=effects[label] - float(drawn[label].mean()),
            interval=_interval(sums, controls[label], draws, seed),
            p=p_values.get(label),
            adjusted=adjusted.get(label),
        )
    return found


def p_of_draws(effects: Mapping[str, float], drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
    """p of every network that its effect is that of one more draw; none where there are fewer than 3 draws.

    Args:
        effects: label -> effect of the network.
        drawn: label -> effects of its draws, shape (draws,).

    Raises:
        FNSFTError: an effect is NaN or infinite.
    """
    check_finite([*effects.values(), *(each for of in drawn.values() for each in of)], "effects to be compared")
    if min(map(len, drawn.values()), default=0) < 3:
        return {}
    null = np.concatenate([_standardised_draws(values) for values in drawn.values()])
    found = {}
    for label, value in effects.items():
        own = _standardised(value, drawn[label])
        reached = null >= own - 1e-12 * abs(own)
        found[label] = float((1 + reached.sum()) / (1 + len(null)))
    return found


def _standardised(value: float, draws: np.ndarray) -> float:
    """As that of one more draw: over the deviation of a difference from the mean of so many."""
    deviation = max(float(draws.std(ddof=1)), 1e-12 + 1e-9 * float(np.abs(draws).max()))
    return (value - float(draws.mean())) / (deviation * np.sqrt(1 + 1 / len(draws)))


def _standardised_draws(draws: np.ndarray) -> np.ndarray:
    """Each by the others."""
    others = len(draws) - 1
    means = (draws.sum() - draws) / others
    squares = (np.square(draws - draws.mean()).sum() - np.square(draws - draws.mean()) * (others + 1) / others).clip(0)
    deviations = np.maximum(np.sqrt(squares / (others - 1)), 1e-12 + 1e-9 * np.abs(draws).max())
    return (draws - means) / (deviations * np.sqrt(1 + 1 / others))


def _interval(sums: Sums, controls: Sequence[Sums], draws: int, seed: int) -> tuple[float, float]:
    """Of the network's mean less that of its draws, units and draws both drawn anew."""
    weights = _weights(len(sums.values), draws, seed)
    counts = weights @ sums.counts
    generator = np.random.default_rng(seed + 1)
    chosen = generator.multinomial(len(controls), np.full(len(controls), 1 / len(controls)), size=draws)
    of_draws = weights @ np.stack([each.values for each in controls], 1)  # (draws, controls)
    found = (weights @ sums.values - (of_draws * chosen).sum(1) / len(controls)) / counts
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _weights(units: int, draws: int, seed: int) -> np.ndarray:
    """How often each unit is drawn, shape (draws, units)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(units, np.full(units, 1 / units), size=draws).astype(float)
