"""Decomposition: sketches in, components and their reliability out. Pure tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..compat.torch import exact
from ..errors import FNSFTError
from .components import IcaSettings, Reduced, components_of
from .ica import TOLERANCE
from .matching import match_components
from .moments import COLUMNS, Moments
from .sketch import ActivationSketch, eigh_descending
from .units import Units


# Components are made of this many times k principal directions and the k strongest stay. With exactly k, the space cut
# off at k differs from one half of the tokens to the other, and every component with it.
_OVERSAMPLING = 1.5


@dataclass
class Decomposition:
    """Components of a stream of activations, in canonical order and sign.

    Components are ordered by explained variance, largest first; the largest loading of each is positive.

    Attributes:
        loadings (`torch.Tensor`): shape (components, neurons), float32: what one standard deviation of the component
            adds to the neuron's activation. When z-scored, it is what that adds to the z-score; by layers, to the
            activation over the RMS of the layer. For massive neurons see [`~fnsft_trl.discovery.units.Units`]. Of
            clusters, the cosine of the neuron to the centroid.
        explained_variance (`list[float]`): share of the total variance in these units, per component; of clusters,
            that of the neurons in it.
        kurtosis (`list[float]`): excess kurtosis of the component over tokens (temporal) or neurons (spatial).
        reliability (`list[float]`): |correlation| of the component's loadings between two disjoint halves, in [0, 1].
        jaccard (`list[float]`): overlap of its 2% largest |loadings| between the halves.
        converged (`bool`): whether these components settled, in the whole and in both halves.
        change (`float`): how far from 1 the cosine between the last two directions of one of them is, at worst.
        moments (`Moments`): of the activations.
    """

    loadings: torch.Tensor
    explained_variance: list[float]
    kurtosis: list[float]
    reliability: list[float]
    jaccard: list[float]
    converged: bool
    change: float
    moments: Moments


def decompose(
    halves: Sequence[Sequence[ActivationSketch]],
    settings: IcaSettings,
    units: Units | None = None,
    weights: torch.Tensor | None = None,
) -> Decomposition:
    """Decompose the union of all sketches, and each half alone for the reliability.

    Args:
        halves: two lists of finished sketches; all are of disjoint tokens.
        settings: how.
        units: of the decomposition; those of the centred activations by default. Loadings of neurons that these leave
            out are zero.
        weights: of neurons that are a sample: how many each stands for in the replication, shape (neurons,).

    Raises:
        FNSFTError: a half has no more tokens than components, or fewer independent directions.
    """
    k = settings.components
    for half in halves:
        count, total = sum(s.count for s in half), sum(s.count for part in halves for s in part)
        if count <= k:
            raise FNSFTError(
                f"{total} tokens were read, {count} in one half: more than {k} (ica_components) are needed in each; "
                "give more text or lower ica_components"
            )
    units = units or Units()
    together = [sketch for half in halves for sketch in half]
    whole, first, second = (_components(sketches, settings, units, weights) for sketches in (together, *halves))
    loadings = whole.loadings[:k]
    reliability, jaccard, pairs = _replication(loadings, first.loadings, second.loadings, weights)
    # how far the components that matter are from settled: those kept, and their counterparts in the halves
    change = float(torch.cat([whole.change[:k], first.change[pairs[0]], second.change[pairs[1]]]).max())
    moments = whole.moments
    total = float((moments.variance / units.divisor(moments).square()).sum())
    unit = 1.0 if settings.decomposition == "kmeans" else units.loading_unit(moments)  # cosines have none
    return Decomposition(
        loadings=loadings * unit,
        explained_variance=[float(p) / total for p in whole.power[:k]],
        kurtosis=whole.kurtosis[:k],
        reliability=reliability,
        jaccard=jaccard,
        converged=change < TOLERANCE,
        change=change,
        moments=moments,
    )


def _reduce(sketches: Sequence[ActivationSketch], settings: IcaSettings, units: Units) -> tuple[Reduced, Moments]:
    sketches = [sketch for sketch in sketches if sketch.count]
    moments = Moments.union([sketch.moments for sketch in sketches])
    divisor = units.divisor(moments)
    gram = sum((stack @ stack.T).cpu() for stack in _strips(sketches, moments, divisor))  # (all rows, all rows)
    singular, vectors = eigh_descending(gram, math.ceil(_OVERSAMPLING * settings.components), sketches[0].dtype)
    along = (vectors * singular).T  # (m, all rows): rows and offsets along the basis
    scores = _sampled_scores(sketches, along)
    if len(singular) < settings.components:
        raise FNSFTError(
            f"the activations span {len(singular)} directions, fewer than ica_components={settings.components}; "
            + _remedy(scores, int(divisor.isinf().sum()))
        )
    turn = (vectors / singular).T  # (m, all rows)
    strips = [(turn.to(stack) @ stack).to(sketches[0].dtype) for stack in _strips(sketches, moments, divisor)]
    return Reduced(singular / moments.count**0.5, torch.cat(strips, 1), scores), moments


def _remedy(scores: torch.Tensor, excluded: int) -> str:
    """What to do when there are too few directions, given the scores along them and how many neurons are left out."""
    energy = scores[:, 0].square().sort(descending=True).values if scores.numel() else scores
    if len(energy) and energy[: math.ceil(0.02 * len(energy))].sum() > 0.98 * energy.sum():
        return (
            "a few tokens are so much stronger than all others that these drown: leave them out (ica_skip_tokens, "
            "ica_skip_special), or take ica_dtype=float64"
        )
    if excluded:
        return (
            f"give more varied text, lower ica_components, or raise ica_drop_massive, which leaves out {excluded} "
            "neurons"
        )
    return "give more varied text or lower ica_components"


def _strips(sketches: Sequence[ActivationSketch], moments: Moments, divisor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The stacked sketches in the final units and float64, a strip of columns at a time: all rows, then each mean."""
    for start in range(0, len(divisor), COLUMNS):
        columns = slice(start, start + COLUMNS)
        rows = [exact(s.rows[:, columns]) * (s.divisor[columns] / divisor[columns]) for s in sketches]
        offsets = [
            ((s.moments.mean - moments.mean)[columns] / divisor[columns])[None] * s.count**0.5 for s in sketches
        ]
        yield torch.cat(rows + offsets)


def _sampled_scores(sketches: Sequence[ActivationSketch], along: torch.Tensor) -> torch.Tensor:
    """The sampled tokens of all sketches, sampled at one rate, along the basis, shape (tokens, m)."""
    rate = min(sketch.sampling_rate for sketch in sketches)
    scores, start = [], 0
    offsets = along[:, -len(sketches) :].T  # (sketches, m)
    for sketch, offset in zip(sketches, offsets, strict=True):
        r = len(sketch.singular)
        rows = along[:, start : start + r] / sketch.singular  # (m, r)
        scores.append(sketch.scores[sketch.priority <= rate] @ rows.T.float() + (offset / sketch.count**0.5).float())
        start += r
    return torch.cat(scores)


@dataclass
class _Run:
    loadings: torch.Tensor  # (components and more, neurons), strongest first
    power: torch.Tensor  # (components and more,)
    kurtosis: list[float]
    change: torch.Tensor  # (components and more,)
    moments: Moments


def _components(
    sketches: Sequence[ActivationSketch], settings: IcaSettings, units: Units, weights: torch.Tensor | None
) -> _Run:
    reduced, moments = _reduce(sketches, settings, units)
    found = components_of(reduced, settings, weights)
    loadings = found.loadings
    loadings[:, (moments.variance / units.divisor(moments) == 0).cpu()] = 0
    order = found.power.argsort(descending=True, stable=True)
    loadings = loadings[order]
    peaks = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))  # (components and more, 1)
    return _Run(
        loadings * peaks.sign(), found.power[order], found.kurtosis[order].tolist(), found.change[order], moments
    )


def _replication(
    whole: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None
) -> tuple[list[float], list[float], tuple[torch.Tensor, torch.Tensor]]:
    """|correlation| and Jaccard overlap of the pair of half components that belongs to each final component.

    The halves are matched with each other first, without a look at the whole, and then the whole with the pairs. Also
    gives the pairs' numbers in `a` and in `b`.
    """
    count = min(len(a), len(b))  # a half may have fewer directions than the other
    weights = torch.ones(whole.shape[1]) if weights is None else weights
    whole, a, b = (loadings * weights.sqrt() for loadings in (whole, a[:count], b[:count]))
    partner, correlation = match_components(a, b)
    matched = b[partner]
    pair_of, _ = match_components(whole, a + (a * matched).sum(1, keepdim=True).sign() * matched)
    first, second = (_strongest(half[pair_of], weights) for half in (a, matched))
    both, either = (((sets * weights).sum(1)) for sets in (first & second, first | second))
    return correlation[pair_of].tolist(), (both / either).tolist(), (pair_of, partner[pair_of])


def _strongest(weighted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The neurons of the 2% largest |loadings|, at least one: bool, shape (components, neurons)."""
    share = 0.02 * float(weights.sum())
    most = min(len(weights), 1 + int(share / float(weights.min())))
    order = (weighted.abs() / weights.sqrt()).topk(most).indices
    inside = weights[order].cumsum(1) - weights[order] / 2 <= share
    inside[:, 0] = True
    return torch.zeros_like(weighted, dtype=torch.bool).scatter(1, order, inside)
