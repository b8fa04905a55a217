"""Controls of a network: masks of as many neurons in every layer, chosen without it."""

from collections.abc import Iterator

import torch
from torch import nn

from ..compat.torch import exact
from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import find_neuron_sites
from ..selection.select import select_neurons
from ..template.template import FunctionalNetworkTemplate


DRAWN = ("random", "rms_matched", "layer_shuffled", "surrogate")  # of which there are several
SHARED = ("surrogate",)  # of which every network has the same ones
RANKED = ("activation_rms", "weight_norm")  # of which there is one
MATCHED = ("random", "rms_matched")  # by which verdicts are told
CONTROLS = (*DRAWN, *RANKED)

_FINEST = 8  # neurons of the stratum of the loudest; each two strata, it doubles


class Controls:
    """The controls that a template and its model have.

    Args:
        model: the model of the template.
        template: the networks, with the RMS of each neuron.
        surrogate: as many networks of activations that are shifted in time; none without it.

    Raises:
        FNSFTError: the template knows no RMS.
    """

    def __init__(
        self,
        model: nn.Module,
        template: FunctionalNetworkTemplate,
        surrogate: FunctionalNetworkTemplate | None = None,
    ) -> None:
        if not template.rms:
            raise FNSFTError(
                "the controls of a probe need each neuron's RMS, which this template (converted from lists of "
                "neurons) does not know; discover the networks again"
            )
        self.template, self.surrogate = template, surrogate
        self._norms = weight_norms(model, template)
        self._strata = {layer: strata(rms) for layer, rms in template.rms.items()}

    def names(self) -> list[str]:
        """Those that there are."""
        return [name for name in CONTROLS if name != "surrogate" or self.surrogate is not None]

    def draws(self, name: str, like: NeuronMask, count: int, *, seed: int) -> Iterator[NeuronMask]:
        """Masks of a control, with as many neurons in every layer as a mask has.

        Args:
            name: one of `CONTROLS`.
            like: the mask.
            count: how many; one of those that rank, and of `surrogate` at most as many as it has networks.
            seed: of the draws.
        """
        if name == "activation_rms":
            yield select_neurons(self.template, selector="activation_rms", like=like)
        elif name == "weight_norm":
            yield NeuronMask({layer: _top(self._norms[layer], m) for layer, m in like.layers.items()}, like.site)
        elif name == "surrogate":
            for number in range(min(count, len(self.surrogate.components))):
                yield select_neurons(self.surrogate, [number], like=like)
        elif name == "random":
            for draw in range(count):
                yield select_neurons(self.template, selector="random", like=like, seed=seed + draw)
        elif name == "layer_shuffled":
            for draw in range(count):
                yield _permuted(like, seed + draw)
        else:
            for draw in range(count):
                yield self._matched(like, seed + draw)

    def loudness(self, mask: NeuronMask, like: NeuronMask) -> float:
        """How loud a mask's neurons are beside those of another one: ratio of the geometric means of their RMS."""
        logs = []
        for each in (mask, like):
            values = torch.cat([self.template.rms[layer][members] for layer, members in each.layers.items()])
            logs.append(values.double().clamp_min(1e-12).log().mean())
        return float((logs[0] - logs[1]).exp())

    def _matched(self, like: NeuronMask, seed: int) -> NeuronMask:
        """In every stratum of a layer as many neurons as the mask has there, drawn at random.

        So it has the same profile of RMS. Neurons of the mask itself may be drawn: where it holds all neurons that are
        so loud, no others could tell loudness from anything else, and the two are the same there.
        """
        random = torch.Generator().manual_seed(seed)
        layers = {}
        for layer, members in like.layers.items():
            chosen = torch.zeros_like(members)
            for stratum in self._strata[layer]:
                count = int(members[stratum].sum())
                chosen[stratum[torch.randperm(len(stratum), generator=random)[:count]]] = True
            layers[layer] = chosen
        return NeuronMask(layers, like.site)


def strata(rms: torch.Tensor) -> list[torch.Tensor]:
    """Neurons of one layer in groups of similar RMS, fine where they are loud: 8, 8, 16, 16, 32, 32, and so on.

    Args:
        rms: shape (neurons,).
    """
    order = rms.argsort(descending=True, stable=True)
    found, start, number = [], 0, 0
    while start < len(order):
        size = _FINEST * 2 ** (number // 2)
        if len(order) - start < 2 * size:
            size = len(order) - start
        found.append(order[start : start + size])
        start, number = start + size, number + 1
    return found


def weight_norms(model: nn.Module, template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
    """The norm of all weights of each neuron: layer -> shape (neurons,).

    Raises:
        FNSFTError: the weights are quantised.
    """
    found = {}
    for site in find_neuron_sites(model, kind=template.site):
        if site.layer not in template.widths:
            continue
        squares = torch.zeros(site.width, dtype=torch.float64)
        for part in site.layout.slices:
            weight = part.tensor(model).detach()
            if not weight.is_floating_point():
                raise FNSFTError(
                    f"a probe reads the norms of weights, and {part.full_name} is quantised; load the model in full "
                    "precision"
                )
            numbers = torch.arange(part.first, part.first + part.count)
            rows = exact(part.select(weight, part.indices(numbers).to(weight.device)))
            squares[numbers] += rows.square().reshape(len(part.offsets), part.count, -1).sum((0, 2)).cpu()
        found[site.layer] = squares.sqrt()
    return found


def _top(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many of the highest as a mask has."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[: int(like.sum())]] = True
    return chosen


def _permuted(mask: NeuronMask, seed: int) -> NeuronMask:
    random = torch.Generator().manual_seed(seed)
    return NeuronMask(
        {layer: m[torch.randperm(len(m), generator=random)] for layer, m in mask.layers.items()}, mask.site
    )
