"""The networks of single samples, and which of a template's they are.

The first paper on functional networks looks at each sample by itself, at independent components of its activations
alone. Components of two samples count as the same network if they share more than a fifth of their neurons (IoU above
0.2).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..compat.torch import exact
from ..data.sequences import TokenSequence, text_token_ids
from ..discovery.activations import ActivationReader
from ..discovery.components import IcaSettings, Reduced, components_of
from ..discovery.matching import SAME_NETWORK, overlap
from ..discovery.moments import Moments
from ..discovery.units import Units
from ..errors import FNSFTError
from ..neurons.sites import find_neuron_sites
from ..template.membership import members
from ..template.template import FunctionalNetworkTemplate


_OVERSAMPLING = 1.5  # principal directions for each component, as in a discovery


@dataclass(frozen=True)
class SampleNetwork:
    """In how many samples a network of the template is found.

    Attributes:
        network (`int`): its number.
        samples (`int`): in which one of the sample's own networks shares more than a fifth of its neurons (IoU).
        share (`float`): of all samples.
        null (`float`): the same share after the neurons of the samples changed places within their layers.
        iou (`float`): mean over samples of the largest IoU with one of the sample's own networks.
    """

    network: int
    samples: int
    share: float
    null: float
    iou: float


@dataclass(frozen=True)
class SampleComparison:
    """The networks of a template among those of single samples.

    Attributes:
        networks (`list[SampleNetwork]`): one for each network of the template.
        samples (`list[list[list]]`): of each sample, for each of its own networks, the network of the template that is
            most like it and their IoU.
        tokens (`int`): of all samples.
        left_out (`int`): samples with too few tokens.
    """

    networks: list[SampleNetwork]
    samples: list[list[tuple[int, float]]]
    tokens: int
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compare_samples(
    model: nn.Module,
    tokenizer,
    template: FunctionalNetworkTemplate,
    texts: Iterable[str],
    *,
    count: int,
    max_length: int = 512,
    seed: int = 0,
) -> SampleComparison:
    """Find the networks of single samples, as those of a template were found, and which of these they are.

    Args:
        model: the model of the template.
        tokenizer: its tokenizer.
        template: the networks; each sample has as many of its own.
        texts: the samples.
        count: of samples, at most.
        max_length: tokens of a sample that are read, at most.
        seed: of the permutations of the null, one for each sample.

    Raises:
        FNSFTError: the template is of another model or was converted, or no sample has enough tokens.
    """
    template.check_model(model)
    settings, units = _settings(template)
    sites = [site for site in find_neuron_sites(model, kind=template.site) if site.layer in template.widths]
    reader = ActivationReader(
        model,
        sites,
        batch_size=1,
        max_length=max_length,
        skip_tokens=template.settings.get("ica_skip_tokens", 1),
        special_ids=tokenizer.all_special_ids if template.settings.get("ica_skip_special", True) else (),
    )
    units = Units(units.standardize, units.drop_massive, list(reader.columns.values()))
    sets = [template.members(number) for number in range(len(template.components))]
    own = torch.stack([torch.cat([each[site.layer] for site in sites]) for each in sets])
    least = math.ceil(_OVERSAMPLING * settings.components) + 2
    sequences, left_out = [], 0
    for text in texts:
        if len(sequences) == count:
            break
        ids = text_token_ids(text, tokenizer)[:max_length]
        if len(ids) <= least + reader.skip_tokens:
            left_out += 1
        else:
            sequences.append([TokenSequence(ids, 0)])
    if not sequences:
        raise FNSFTError(
            f"no sample has more than {least} tokens, which {settings.components} networks of its own need; give "
            "longer texts, or a template of fewer networks"
        )
    return _compared(reader, sequences, own, template, settings, units, left_out, seed, max_length)


def _compared(reader, sequences, own, template, settings, units, left_out, seed, max_length) -> SampleComparison:
    found, hits, chance, likeness, tokens = [], 0, 0, 0, 0
    blocks = reader.read(sequences, max_tokens=max_length, description="samples")
    for number, block in enumerate(block for block in blocks if len(block.rows)):
        sets = sample_networks(block.rows, template, reader.columns, settings, units)
        tokens += len(block.rows)
        likes = overlap(own, sets)  # (networks of the template, of the sample)
        best, which = likes.max(0)
        found.append([(int(network), round(float(value), 4)) for network, value in zip(which, best, strict=True)])
        nearest = likes.max(1).values
        likeness, hits = likeness + nearest, hits + (nearest > SAME_NETWORK).long()
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        places = torch.cat(
            [c.start + torch.randperm(c.stop - c.start, generator=random) for c in reader.columns.values()]
        )
        chance = chance + (overlap(own, sets[:, places]).max(1).values > SAME_NETWORK).long()
    networks = [
        SampleNetwork(
            number,
            int(hits[number]),
            float(hits[number]) / len(found),
            float(chance[number]) / len(found),
            float(likeness[number]) / len(found),
        )
        for number in range(len(own))
    ]
    return SampleComparison(networks, found, tokens, left_out)


def sample_networks(rows: torch.Tensor, template, columns: dict[int, slice], settings: IcaSettings, units: Units):
    """The networks of one sample, by the threshold of a template: bool, shape (components, neurons).

    Args:
        rows: its activations, shape (tokens, neurons); they are changed.
        template: by whose threshold neurons belong to a network.
        columns: of each layer.
        settings, units: of the decomposition.
    """
    moments = Moments.centring(rows)
    rows = exact(rows)  # (tokens, neurons)
    rows = rows / units.divisor(moments).to(rows.device)
    u, singular, v = torch.linalg.svd(rows, full_matrices=False)
    kept = min(math.ceil(_OVERSAMPLING * settings.components), int((singular > 1e-9 * singular[0]).sum()))
    scores = (u[:, :kept] * singular[:kept]).float().cpu()
    reduced = Reduced(singular[:kept].cpu() / len(rows) ** 0.5, v[:kept].float().cpu(), scores)
    components = components_of(reduced, settings, None)
    order = components.power.argsort(descending=True, stable=True)[: settings.components]
    loadings = components.loadings[order]
    peaks = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
    loadings = (loadings * peaks.sign()).numpy()
    sets = [members({layer: each[c] for layer, c in columns.items()}, template.threshold) for each in loadings]
    return torch.stack([torch.cat([torch.from_numpy(part[layer]) for layer in columns]) for part in sets])


def _settings(template: FunctionalNetworkTemplate) -> tuple[IcaSettings, Units]:
    """How the networks of a template were found."""
    given = template.settings
    if template.threshold is None or "ica_standardize" not in given:
        raise FNSFTError(
            "the template was converted from lists of neurons and does not say how its networks were found; discover "
            "them again"
        )
    settings = IcaSettings(
        len(template.components),
        variant=given["ica_variant"],
        contrast=given["ica_contrast"],
        backend=given.get("ica_backend", "torch"),
        seed=given["ica_seed"],
        decomposition=given.get("ica_decomposition", "ica"),
    )
    return settings, Units(given["ica_standardize"], given.get("ica_drop_massive"))
