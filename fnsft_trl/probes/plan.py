"""The plan of a probe: its networks, and all conditions of its curves with their controls."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import torch

from ..neurons.mask import NeuronMask
from ..selection.select import select_neurons
from ..template.template import FunctionalNetworkTemplate
from .condition import Condition
from .config import CURVES
from .controls import MATCHED, Controls


DOSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
KEPT = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
FACTORS = (0.5, 2.0, 4.0)

_MANY = 0.15  # of all neurons, drawn at random, which the first paper compares its networks with
_PART, _FEWEST = 4, 3


@dataclass(frozen=True)
class Network:
    """A network of a probe.

    Attributes:
        label (`str`): what a report calls it.
        number (`int`): of the network in its template.
        mask (`NeuronMask`): its neurons.
        controls (`Controls`): those of its template.
        domain (`str` or `None`): name of the data that it is of.
    """

    label: str
    number: int
    mask: NeuronMask = field(repr=False)
    controls: Controls = field(repr=False)
    domain: str | None = None

    def seed(self, of_probe: int) -> int:
        """Of the draws beside it, no other network's: the verdicts take those of all networks for independent."""
        return of_probe + zlib.crc32(self.label.encode())


def networks_of(
    controls: Controls,
    ids: Sequence[int],
    *,
    fraction: float | None = None,
    domain: str | None = None,
) -> list[Network]:
    """The networks of one template.

    Args:
        controls: of the template.
        ids: numbers of the networks.
        fraction: share of all neurons that each of them is, those of the largest |loading|; by the template's
            threshold by default.
        domain: name of the data that they are of, which goes before their numbers.

    Raises:
        FNSFTError: the template has no such network, or one has no neuron.
    """
    found = []
    for number in ids:
        chosen = {} if fraction is None else {"fraction": fraction, "per_layer": False}
        mask = select_neurons(controls.template, [number], **chosen)
        label = str(number) if domain is None else f"{domain}/{number}"
        found.append(Network(label, number, mask, controls, domain))
    return found


def plan(
    networks: Sequence[Network],
    *,
    curves: Sequence[str] = CURVES,
    draws: int = 20,
    seed: int = 0,
) -> list[Condition]:
    """All conditions of a probe.

    The lesion of every network has all draws of the random and the amplitude-matched control, which give the verdicts.
    Of shuffled and surrogate networks it has a quarter as many, at least 3. A point of another curve has that many of
    the first two, and the highest activation and weight norm.

    Args:
        networks: those that are probed; of one template, or of several for one model.
        curves: which of `CURVES`.
        draws: of the random and the amplitude-matched control.
        seed: of the draws.
    """
    everything = _everything(networks)
    found = [Condition("full", "networks", None, 0.0, 0, everything)]
    for curve in curves:
        found += _lesions(networks, draws, seed) if curve == "lesion" else _CURVES[curve](networks, fewer(draws), seed)
    return found


def fewer(draws: int) -> int:
    """The draws of what no verdict is told by: a quarter, at least 3."""
    return max(_FEWEST, draws // _PART)


def _everything(networks: Sequence[Network]) -> NeuronMask:
    first = networks[0].mask
    return NeuronMask({layer: torch.ones_like(m) for layer, m in first.layers.items()}, first.site)


def _with_controls(
    curve: str,
    label: str | None,
    point: float,
    mask: NeuronMask,
    controls: Controls,
    draws: int,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    factor: float | None = None,
    ablation: str | None = None,
    inverted: bool = False,
) -> Iterator[Condition]:
    """A mask and its controls; `inverted` silences all but them."""

    def condition(selector: str, draw: int, chosen: NeuronMask, **about) -> Condition:
        silenced = ~chosen if inverted else chosen
        return Condition(curve, selector, label, point, draw, silenced, factor, ablation, about)

    yield condition("networks", 0, mask)
    for name in controls.names() if names is None else names:
        count = draws if name in MATCHED else fewer(draws)
        for draw, chosen in enumerate(controls.draws(name, mask, count, seed=seed)):
            shared = (chosen & mask).count / mask.count
            loudness = controls.loudness(chosen, mask)
            yield condition(name, draw, chosen, shared=round(shared, 4), loudness=round(loudness, 4))


def _lesions(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    """Of each network by itself, beside every control."""
    for network in networks:
        of_network = network.seed(seed)
        yield from _with_controls("lesion", network.label, 0.0, network.mask, network.controls, draws, of_network)


def _unions(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    """Of the first m networks."""
    union = networks[0].mask
    for count, network in enumerate(networks, 1):
        union = union | network.mask
        yield from _with_controls("union", None, float(count), union, network.controls, draws, seed, names=_FEW)
    template = networks[0].controls.template
    for draw in range(draws):
        many = select_neurons(template, selector="random", fraction=_MANY, per_layer=False, seed=seed + draw)
        yield Condition("union", "random_15", None, float(len(networks)), draw, many)


def _doses(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    """The neurons of the largest |loading| in any of the networks."""
    for share in DOSES:
        mask = _share(networks, share)
        yield from _with_controls("dose", None, share, mask, networks[0].controls, draws, seed, names=_FEW)


def _preserved(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    for share in KEPT:
        if share == 1.0:
            continue  # nothing is silenced
        mask = _share(networks, share)
        yield from _with_controls(
            "preserve", None, share, mask, networks[0].controls, draws, seed, names=_FEW, inverted=True
        )


def _amplified(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    for network in networks:
        for factor in FACTORS:
            yield from _with_controls(
                "amplify",
                network.label,
                factor,
                network.mask,
                network.controls,
                draws,
                network.seed(seed),
                names=("random", "rms_matched"),
                factor=factor,
            )


def _kept(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    """The networks, all together, without all other neurons."""
    union = _union(networks)
    yield from _with_controls(
        "kept", None, round(union.fraction, 4), union, networks[0].controls, draws, seed, names=_FEW, inverted=True
    )


def _pruned(networks: Sequence[Network], draws: int, seed: int) -> Iterator[Condition]:
    """The neurons of no network pruned in all layers but the first and the last.

    Setting a neuron to its mean is to take it away and to add to the bias what it gave on average.
    """
    union = _union(networks)
    ends = (min(union.layers), max(union.layers))
    kept = NeuronMask({i: torch.ones_like(m) if i in ends else m for i, m in union.layers.items()}, union.site)
    pruned = round((~kept).fraction, 4)
    for curve, ablation in (("prune", "mean"), ("cut", "zero")) if pruned else ():
        yield from _with_controls(
            curve,
            None,
            pruned,
            kept,
            networks[0].controls,
            draws,
            seed,
            names=_FEW,
            ablation=ablation,
            inverted=True,
        )


def _union(networks: Sequence[Network]) -> NeuronMask:
    return reduce(or_, (network.mask for network in networks))


def _share(networks: Sequence[Network], share: float) -> NeuronMask:
    template: FunctionalNetworkTemplate = networks[0].controls.template
    ids = sorted({network.number for network in networks if network.controls.template is template})
    return select_neurons(template, ids, fraction=share, per_layer=False)


_FEW = ("random", "rms_matched", "activation_rms", "weight_norm")
_CURVES = {
    "union": _unions,
    "dose": _doses,
    "preserve": _preserved,
    "amplify": _amplified,
    "kept": _kept,
    "prune": _pruned,
}
