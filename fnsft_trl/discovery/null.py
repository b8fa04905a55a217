"""The null of reliability: what it is for activations without co-activation."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..compat.torch import exact
from .decomposition import IcaSettings, decompose
from .moments import Moments
from .sketch import ActivationSketch
from .units import Units


_NEURONS = 512  # that are taken, and more where many components are asked for
_TOKENS = 8192  # of whose activations each neuron draws
_BLOCK = 2048  # tokens drawn at a time


def null_reliability(
    halves: Sequence[Sequence[ActivationSketch]], settings: IcaSettings, units: Units
) -> dict[str, float]:
    """What reliability and overlap of as many components would be without co-activation.

    As many tokens as there were are drawn anew in each half. Each neuron's activation is drawn by itself from all that
    it had. So every neuron does what it did, and no two do anything together. The neurons that vary most are taken,
    for one of these can be a component by itself, and others at random.

    Args:
        halves: two lists of finished sketches.
        settings: as of the networks themselves; a single start of few iterations is enough here.
        units: as of the networks themselves.

    Returns:
        `reliability` and `jaccard`, means over the components, and `highest`, the reliability of the most reliable of
        them; all in [0, 1]. Of z-scored activations all are near zero. Of centred ones a few neurons can carry most of
        the variance. Each of these is then a component by itself, and returns without any co-activation. The
        correlation is high then, and only the overlap is near zero.

    Raises:
        FNSFTError: as [`decompose`].
    """
    random = torch.Generator().manual_seed(settings.seed)
    together = [sketch for half in halves for sketch in half if sketch.count]
    moments = Moments.union([sketch.moments for sketch in together])
    divisor = units.divisor(moments)
    columns, weights = _neurons(moments.variance.sqrt() / divisor, settings.components, random)
    values = _activations(together, moments, divisor, columns)
    drawn = [[_drawn(values, half, random)] for half in halves]
    result = decompose(drawn, replace(settings, restarts=1, max_iterations=50), weights=weights)
    k = settings.components
    return {
        "reliability": sum(result.reliability) / k,
        "jaccard": sum(result.jaccard) / k,
        "highest": max(result.reliability),
    }


def _neurons(deviation: torch.Tensor, components: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons that are taken, given the standard deviation of each in the units, and how many each stands for."""
    varying = (deviation > 0).nonzero().flatten().cpu()
    order = varying[torch.randperm(len(varying), generator=random)]
    strongest = deviation.cpu()[order].argsort(descending=True, stable=True)[: 4 * components]
    rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, strongest, False)
    others = order[rest][: max(_NEURONS, 8 * components) - len(strongest)]
    weight = float(rest.sum()) / max(1, len(others))
    return torch.cat([order[strongest], others]), torch.tensor([1.0] * len(strongest) + [weight] * len(others))


def _activations(
    sketches: Sequence[ActivationSketch], moments: Moments, divisor: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Activations of some neurons in the units, less their mean, at the tokens that the sketches keep, shape (tokens,
    neurons): as far as the sketches hold them, with the variance that is known exactly."""
    rate = min(sketch.sampling_rate for sketch in sketches)
    rate *= min(1.0, _TOKENS / sum(int((sketch.priority <= rate).sum()) for sketch in sketches))
    columns = columns.to(divisor.device)
    values = []
    for sketch in sketches:
        scale = sketch.divisor[columns] / divisor[columns]
        rows = exact(sketch.rows[:, columns.to(sketch.rows.device)]) * scale
        offset = (sketch.moments.mean - moments.mean)[columns] / divisor[columns]
        rows, offset = rows.cpu() / sketch.singular[:, None], offset.cpu()
        values.append(sketch.scores[sketch.priority <= rate] @ rows.float() + offset.float())
    whole = torch.cat(values)
    whole -= whole.mean(0)
    deviation = (moments.variance[columns].sqrt() / divisor[columns]).cpu().float()
    return whole.mul_(deviation / whole.square().mean(0).sqrt().clamp_min(1e-6 * deviation))


def _drawn(values: torch.Tensor, like: Sequence[ActivationSketch], random: torch.Generator) -> ActivationSketch:
    """A sketch of as many tokens as some others have, in which each neuron draws its activations by itself."""
    tokens = sum(sketch.count for sketch in like)
    blocks = (
        values.gather(0, torch.randint(len(values), (min(_BLOCK, tokens - start), values.shape[1]), generator=random))
        for start in range(0, tokens, _BLOCK)
    )
    return ActivationSketch.of_few_neurons(blocks, values.shape[1], like[0].rank, reservoir=like[0].reservoir)
