"""Double dissociation: whether the networks of each dataset hurt their own data more than the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.paired import holm
from ..finite import check_finite
from .found import Found


PERMUTATIONS = 4999


@dataclass(frozen=True)
class Dissociation:
    """Networks of several datasets against several evaluation sets.

    Attributes:
        data (`tuple[str, ...]`): names of the evaluation sets.
        shares (`dict[str, list[float]]`): network -> of each set, the damage of its lesion over that of random masks,
            as a share of that of the full lesion.
        own (`dict[str, str]`): network -> the set of its own domain.
        advantage (`dict[str, float]`): network -> share on its own set less the mean of the others.
        p (`dict[str, float]`): network -> p that its own set is hurt no more than the others, by permuting sequences;
            adjusted by Holm.
        together (`float` or `None`): p that all networks are hurt no more on their own sets than on others, by
            permuting which networks belong to which set; `None` where all are of one set.
    """

    data: tuple[str, ...]
    shares: dict[str, list[float]]
    own: dict[str, str]
    advantage: dict[str, float]
    p: dict[str, float]
    together: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return vars(self) | {"data": list(self.data)}


def dissociate(found: Found, own: Mapping[str, str], *, seed: int = 0) -> Dissociation:
    """Whether networks hurt their own domain more than others.

    From the damage of a network on a sequence, the mean damage of its layer-matched random masks there is subtracted.
    So a domain in which any lesion hurts more is no advantage. The rest is taken as a share of what the full lesion
    does on that set.

    Args:
        found: with at least two datasets, on each of which a lesion of all neurons does damage.
        own: network -> name of its own dataset.
        seed: of the permutations.

    Raises:
        FNSFTError: on one of the datasets a lesion of all neurons does nothing.
    """
    names = tuple(found.data)
    per_unit = {label: [_damage(found, name, label) for name in names] for label in own}
    shares = {label: [float(each.mean()) for each in parts] for label, parts in per_unit.items()}
    for label, values in shares.items():
        check_finite(values, f"damage of network {label} as a share of that of all neurons", "leave such data out")
    random = np.random.default_rng(seed)
    advantage, p_values = {}, {}
    for label, domain in own.items():
        place = names.index(domain)
        advantage[label] = _advantage(shares[label], place)
        p_values[label] = _permuted(per_unit[label], place, random)
    return Dissociation(names, shares, dict(own), advantage, holm(p_values), _together(shares, own, names, random))


def _damage(found: Found, data: str, label: str) -> np.ndarray:
    """Of each sequence, less that of random masks, as a share of the full lesion's mean; shape (units,)."""
    (network,) = found.of("lesion", selector="networks", network=label)
    random = found.of("lesion", selector="random", network=label)
    full = found.measures(data, found.of("full")[0].key)["cross_entropy"]
    intact = found.measures(data, "intact")["cross_entropy"]
    own = found.measures(data, network.key)["cross_entropy"].values
    drawn = np.mean([found.measures(data, each.key)["cross_entropy"].values for each in random], axis=0)
    return (own - drawn) / intact.counts / (full.mean - intact.mean)


def _advantage(shares: Sequence[float], place: int) -> float:
    others = [value for number, value in enumerate(shares) if number != place]
    return shares[place] - float(np.mean(others))


def _permuted(parts: Sequence[np.ndarray], place: int, random: np.random.Generator) -> float:
    """p of one network, by which sequences are of its own set."""
    pooled, ends = np.concatenate(parts), np.cumsum([len(each) for each in parts])[:-1]
    own = _advantage([float(each.mean()) for each in parts], place)
    reached = 0
    for _ in range(PERMUTATIONS):
        shuffled = np.split(random.permutation(pooled), ends)
        reached += _advantage([float(each.mean()) for each in shuffled], place) >= own - 1e-12
    return (1 + reached) / (1 + PERMUTATIONS)


def _together(
    shares: Mapping[str, Sequence[float]], own: Mapping[str, str], names: Sequence[str], random: np.random.Generator
) -> float | None:
    labels = list(own)
    places = np.array([names.index(own[label]) for label in labels])
    if len(set(places.tolist())) < 2:
        return None
    table = np.array([[_advantage(shares[label], place) for place in range(len(names))] for label in labels])
    rows = np.arange(len(labels))
    value = table[rows, places].mean()
    reached = sum(table[rows, random.permutation(places)].mean() >= value - 1e-12 for _ in range(PERMUTATIONS))
    return float((1 + reached) / (1 + PERMUTATIONS))
