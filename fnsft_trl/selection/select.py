"""select_neurons: networks, and the controls they must be compared with, as NeuronMasks.

| selector | which neurons |
|---|---|
| `"networks"` | those of the networks |
| `"layer_shuffled"` | as many of every layer as the networks have there, the neurons of the layer shuffled |
| `"surrogate"` | those of as many networks of activations that are shifted in time, neuron by neuron |
| `"random"` | drawn at random |
| `"activation_rms"` | by RMS on the calibration text (`"activation"` is the same) |
| `"contrast"` | by how much more the task uses them than the calibration text does |
| `"gradient_conflict"` | by how much gradients on the task and on general text point against each other |

The first three look at networks.
"""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real

import torch
from transformers.utils import logging

from ..config import MEASURED_SELECTORS, NETWORK_SELECTORS, SELECTOR_ALIASES, SELECTORS
from ..errors import FNSFTError
from ..finite import check_finite
from ..neurons.mask import NeuronMask, check_mask
from ..ranges import format_ranges, parse_ranges
from ..template.template import FunctionalNetworkTemplate
from .evidence import SelectorEvidence


logger = logging.get_logger(__name__)


def select_neurons(
    template: FunctionalNetworkTemplate,
    component_ids: Sequence[int] | str | None = None,
    *,
    selector: str = "networks",
    fraction: float | None = None,
    per_layer: bool = True,
    rank: str = "highest",
    seed: int = 0,
    like: NeuronMask | None = None,
    min_reliability: float = 0.0,
    layers: Sequence[int] | str | None = None,
    evidence: SelectorEvidence | None = None,
) -> NeuronMask:
    """Select neurons by the networks they belong to, or by a control (`SELECTORS`).

    Without `fraction` and `like`, the selector `networks` gives the union of the named networks, by the template's
    threshold. With one of them, it ranks neurons by their largest |loading| in these networks.

    Args:
        template: the networks.
        component_ids: numbers of the networks, or text such as `"0-3,7"`; all of them by default. Only for selectors
            that look at networks.
        selector: networks, layer_shuffled, surrogate, random, activation_rms, contrast, gradient_conflict.
        fraction: share of the neurons to select, in (0, 1).
        per_layer: take the share of every layer (rounded, at least one neuron), instead of all layers pooled.
        rank: `"highest"`, or `"lowest"`: those most outside the networks, most quiet, least in conflict.
        seed: of `"random"` and `"layer_shuffled"`.
        like: take as many neurons of every layer as this mask has, instead of a fraction.
        min_reliability: leave out networks whose reliability above null (`template.reliability_above_null`) is lower,
            in [0, 1]. Of a template that knows no null, with a warning, the bare reliability counts.
        layers: select in these layers only; in all of the template's by default. What belongs to a network stays as
            its threshold over all layers has it.
        evidence: model and texts that `"surrogate"`, `"contrast"` and `"gradient_conflict"` are measured on.

    Returns:
        A [`NeuronMask`] over these layers.

    Raises:
        FNSFTError: an unknown selector, network or layer, a fraction out of range, no evidence, no neuron, or NaN.
    """
    selector = SELECTOR_ALIASES.get(str(selector), selector)
    _check_request(template, selector, rank, component_ids, fraction, like, evidence)
    _check_numbers(fraction, seed, min_reliability)
    ids = _networks(template, component_ids, min_reliability if selector in NETWORK_SELECTORS else 0)
    chosen = _layers(template, layers)
    source = evidence.surrogate(template) if selector == "surrogate" else template
    if fraction is None and like is None:
        found = _members(source, ids, seed if selector == "layer_shuffled" else None)
        mask = NeuronMask({layer: found[layer] for layer in chosen}, template.site)
    else:
        found = _scores(source, ids, selector, seed, evidence)
        scores = {layer: -found[layer] if rank == "lowest" else found[layer] for layer in chosen}
        mask = NeuronMask(_take(scores, fraction, per_layer, like), template.site)
    if mask.count == 0:
        raise FNSFTError(
            f"the selection holds no neuron (networks {format_ranges(sorted(ids))}, layers {format_ranges(chosen)}, "
            f"{template.threshold}); lower the threshold or select a fraction"
        )
    return mask


def _members(template, ids, seed: int | None) -> dict[int, torch.Tensor]:
    """The union of some networks, those of each layer shuffled by a seed if there is one."""
    members = [template.members(number) for number in ids]
    found = {layer: _union(m[layer] for m in members) for layer in template.loadings}
    return found if seed is None else _shuffled(found, seed)


def _check_request(template, selector, rank, component_ids, fraction, like, evidence) -> None:
    if not isinstance(template, FunctionalNetworkTemplate):
        raise FNSFTError(
            f"template is a {type(template).__name__}; expected a FunctionalNetworkTemplate, as its from_pretrained "
            "reads one"
        )
    if selector not in SELECTORS:
        raise FNSFTError(f"selector {selector!r} is unknown; it must be one of: {', '.join(SELECTORS)}")
    if rank not in ("highest", "lowest"):
        raise FNSFTError(f"rank {rank!r} is unknown; it must be highest or lowest")
    if fraction is not None and like is not None:
        raise FNSFTError("fraction and like both say how many neurons to select; give one of them")
    if fraction is None and like is None:
        if rank == "lowest":
            raise FNSFTError("rank='lowest' needs fraction or like: how many neurons to select")
        if selector not in NETWORK_SELECTORS:
            raise FNSFTError(f"selector={selector!r} needs fraction or like: how many neurons to select")
    if selector not in NETWORK_SELECTORS and component_ids is not None:
        raise FNSFTError(
            f"selector={selector!r} takes no component_ids; only {', '.join(map(repr, NETWORK_SELECTORS))} do"
        )
    if like is not None:
        check_mask(like, "like")
    if selector in MEASURED_SELECTORS and not isinstance(evidence, SelectorEvidence):
        raise FNSFTError(
            f"selector={selector!r} is measured on texts: give evidence=SelectorEvidence(model, tokenizer, task=..., "
            "general=...)"
        )


def _check_numbers(fraction, seed, min_reliability) -> None:
    if fraction is not None and not (isinstance(fraction, Real) and 0 < fraction < 1):
        raise FNSFTError(f"fraction is {fraction!r}; it must be a number between 0 and 1")
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
        raise FNSFTError(f"seed is {seed!r}; it must be a whole number of 64 bits")
    if not isinstance(min_reliability, Real) or not 0 <= min_reliability <= 1:
        raise FNSFTError(f"min_reliability is {min_reliability!r}; it must be a number from 0 to 1")


def _numbers(given, count: int, what: str) -> list[int]:
    """The numbers that are named by one of them, several, or text.

    Raises:
        FNSFTError: something in them is no number.
    """
    if isinstance(given, torch.Tensor):
        given = given.tolist()
    if isinstance(given, str):
        return parse_ranges(given, count, what=what)
    numbers = list(given) if isinstance(given, Iterable) else [given]
    for number in numbers:
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise FNSFTError(f"{what} {number!r} is no number of one; give whole numbers, or text such as 0-3,7")
    return [int(number) for number in numbers]


def _networks(template, component_ids, min_reliability: float) -> list[int]:
    """The numbers of the networks that are meant, of those that are reliable enough."""
    count = len(template.components)
    ids = list(range(count)) if component_ids is None else _numbers(component_ids, count, "network")
    unknown = [number for number in ids if not 0 <= number < count]
    if unknown or not ids:
        named = format_ranges(sorted(set(unknown))).replace(",", ", ") or "(none was named)"
        raise FNSFTError(f"the template has no network {named}; it has the networks {format_ranges(range(count))}")
    return ids if min_reliability <= 0 else _reliable(template, ids, min_reliability)


def _reliable(template, ids: list[int], least: float) -> list[int]:
    """Those networks whose reliability above null is high enough."""
    bare = [component.reliability for component in template.components]
    if None in bare:
        raise FNSFTError(
            "the template was converted from lists of neurons, so its reliability is unknown; drop min_reliability"
        )
    if template.null is None:
        what, known = "reliability (null unknown)", bare
        logger.warning(
            "the template does not know its null, the reliability of networks without co-activation: min_reliability "
            "is compared with the bare reliability; discover the networks again to know both"
        )
    else:
        what, known = (
            "reliability above null",
            [template.reliability_above_null(number) for number in range(len(bare))],
        )
    reliable = [number for number in ids if known[number] >= least]
    if not reliable:
        best = max(ids, key=lambda number: (known[number], bare[number]))
        centred = template.null is not None and template.settings.get("ica_standardize") in ("center", "layer")
        raise FNSFTError(
            f"no network has a {what} of {least:g}; the highest is {known[best]:.2f} (its reliability is "
            f"{bare[best]:.2f}): lower min_reliability, or discover on more tokens"
            + (", or z-scored (ica_standardize), where the null is near zero" if centred else "")
        )
    return reliable


def _layers(template, layers) -> list[int]:
    """The layers that are meant, ascending."""
    if layers is None or (isinstance(layers, str) and layers.strip() == "all"):
        return list(template.loadings)
    layers = _numbers(layers, max(template.loadings) + 1, "layer")
    unknown = sorted(set(layers) - set(template.loadings))
    if unknown or not layers:
        raise FNSFTError(
            f"the template does not cover layer {format_ranges(unknown) or '(none was named)'}; it covers layers "
            f"{format_ranges(template.loadings)}"
        )
    return sorted(set(layers))


def _union(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).any(0)


def _scores(template, ids, selector, seed, evidence) -> dict[int, torch.Tensor]:
    if selector in NETWORK_SELECTORS:
        found = {layer: values[ids].abs().amax(0) for layer, values in template.loadings.items()}
        return _shuffled(found, seed) if selector == "layer_shuffled" else found
    if selector == "contrast":
        return evidence.contrast(template)
    if selector == "gradient_conflict":
        return evidence.gradient_conflict(template)
    if selector == "activation_rms":
        if not template.rms:
            raise FNSFTError(
                "selector='activation_rms' needs each neuron's RMS, which this template (converted from lists of "
                "neurons) does not know; discover the networks again"
            )
        return template.rms
    random = torch.Generator().manual_seed(int(seed))
    return {layer: torch.rand(width, generator=random) for layer, width in template.widths.items()}


def _shuffled(values: dict[int, torch.Tensor], seed: int) -> dict[int, torch.Tensor]:
    """The values of each layer in another order, drawn by a seed."""
    random = torch.Generator().manual_seed(int(seed))
    return {layer: found[torch.randperm(len(found), generator=random)] for layer, found in values.items()}


def _take(scores, fraction, per_layer, like) -> dict[int, torch.Tensor]:
    """The highest scores: in every layer as many as `like` has or as `fraction` gives, or pooled over layers."""
    for layer, values in scores.items():
        check_finite(values.tolist(), f"scores of neurons in layer {layer}, by which some are selected")
    if like is None and not per_layer:
        pooled = torch.cat(list(scores.values()))
        chosen = _highest(pooled, max(1, round(fraction * len(pooled))))
        return dict(zip(scores, chosen.split([len(values) for values in scores.values()]), strict=True))
    if like is not None:
        widths = {layer: len(values) for layer, values in scores.items()}
        if {layer: len(members) for layer, members in like.layers.items()} != widths:
            raise FNSFTError(
                "the mask given as `like` has other layers or widths than what is selected from; give one of this "
                "model and site"
            )
        counts = {layer: int(members.sum()) for layer, members in like.layers.items()}
    else:
        counts = {layer: max(1, round(fraction * len(values))) for layer, values in scores.items()}
    return {layer: _highest(values, counts[layer]) for layer, values in scores.items()}


def _highest(values: torch.Tensor, count: int) -> torch.Tensor:
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen
