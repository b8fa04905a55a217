"""The texts in which each network is most active, token by token."""

import heapq
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..data.sequences import TokenSequence, token_sequences
from ..discovery.activations import ActivationReader
from ..discovery.scale import activation_scale
from ..errors import FNSFTError
from ..hub.names import source_names
from ..neurons.sites import find_neuron_sites
from ..template.template import FunctionalNetworkTemplate
from .example_file import Example, Examples


_AROUND = 14  # tokens before and after the one at which a network is most active
_MAX_LENGTH = 256


def find_examples(
    model: nn.Module,
    tokenizer,
    template: FunctionalNetworkTemplate,
    texts: Mapping[str, Iterable],
    *,
    count: int,
    max_tokens: int = 20_000,
    tensors_sha256: str | None = None,
) -> Examples:
    """Find the passages in which the networks of a template are most active.

    The activity of the networks at a token is the least-squares fit of the token's activations by the loadings. The
    activations are taken less their mean on the calibration text, in the units of the loadings. Activity is divided by
    its standard deviation on the texts that are read. Of each sequence, a network has at most one passage: what is
    around the token of its largest absolute activity.

    Args:
        model: the model of the template.
        tokenizer: its tokenizer.
        template: the networks.
        texts: name -> texts, as [`~fnsft_trl.discovery.discovery.discover_networks`] takes them.
        count: of each network.
        max_tokens: of all texts together.
        tensors_sha256: of the template on disk, which the examples name.

    Raises:
        FNSFTError: the template is of another model, or was converted and knows no means; or the texts hold no token.
    """
    template.check_model(model)
    if not template.mean:
        raise FNSFTError("the template was converted and knows no means, so no activity: discover the networks again")
    sites = [site for site in find_neuron_sites(model, kind=template.site) if site.layer in template.widths]
    order = [site.layer for site in sites]
    fit = torch.linalg.pinv(torch.cat([template.loadings[layer] for layer in order], 1).double()).float()
    mean = torch.cat([template.mean[layer] for layer in order]).float()
    units = _units(template)
    unit = torch.cat([units[layer] for layer in order]).float()
    collector = _Collector(len(template.components), count)
    sequences = sorted(_sequences(texts, tokenizer, max_tokens), key=lambda item: len(item[0]))  # as the reader has it
    longest = len(sequences[-1][0]) if sequences else 1
    reader = ActivationReader(model, sites, batch_size=1, max_length=longest, skip_tokens=0, special_ids=())
    items = [TokenSequence(ids, 0) for ids, _ in sequences]
    total = sum(len(ids) for ids, _ in sequences)
    for (ids, source), block in zip(
        sequences, reader.read([items], max_tokens=max(1, total), description="examples"), strict=True
    ):
        collector.add(ids, ((block.rows.float().cpu() - mean) * unit) @ fit, source)
    if not collector.tokens:
        raise FNSFTError("the texts hold no two tokens in a row, so there are no examples; give some sentences")
    return collector.finish(tokenizer, tensors_sha256)


def _units(template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
    """What activations are multiplied by to be in the units of the loadings: layer -> shape (neurons,)."""
    if template.settings.get("ica_decomposition") == "kmeans":  # cosines, which have none
        return {layer: torch.ones(width) for layer, width in template.widths.items()}
    scales = activation_scale(template)
    return {layer: torch.where(scale > 0, 1 / scale.clamp_min(1e-30), 0) for layer, scale in scales.items()}


def _sequences(texts: Mapping[str, Iterable], tokenizer, most: int) -> Iterator[tuple[list[int], str]]:
    """Token ids, with the name of their dataset: of each as many."""
    share = -(-most // len(texts))
    for name, rows in zip(source_names(list(texts)), texts.values(), strict=True):
        left = share
        for sequence in token_sequences(iter(rows), tokenizer, max_length=_MAX_LENGTH, name=name):
            if left <= 0:
                break
            if len(sequence.ids) > 1:
                left -= len(sequence.ids)
                yield sequence.ids, name


class _Collector:
    """Keeps the passages of the largest activity of each network."""

    def __init__(self, networks: int, count: int) -> None:
        self._count = count
        self._best: list[list[tuple]] = [[] for _ in range(networks)]
        self._sums = torch.zeros(2, networks, dtype=torch.float64)
        self.tokens = 0
        self._order = 0  # of ties: the first stays

    def add(self, ids: list[int], activity: torch.Tensor, source: str) -> None:
        """One sequence; its first token, an attention sink, is no example."""
        inner = activity[1:]
        self._sums += torch.stack([inner.double().sum(0), inner.double().square().sum(0)])
        self.tokens += len(inner)
        peaks = inner.abs().max(0)
        for network, (value, place) in enumerate(zip(peaks.values.tolist(), peaks.indices.tolist(), strict=True)):
            self._order -= 1
            start, end = max(0, place + 1 - _AROUND), place + 2 + _AROUND
            entry = (value, self._order, ids[start:end], activity[start:end, network].tolist(), source)
            if len(self._best[network]) < self._count:
                heapq.heappush(self._best[network], entry)
            elif value > self._best[network][0][0]:
                heapq.heapreplace(self._best[network], entry)

    def finish(self, tokenizer, tensors_sha256: str | None) -> Examples:
        """The passages as text, the most active first."""
        mean = self._sums[0] / self.tokens
        deviation = (self._sums[1] / self.tokens - mean.square()).clamp_min(1e-24).sqrt().tolist()
        networks = []
        for entries, scale in zip(self._best, deviation, strict=True):
            ordered = sorted(entries, key=lambda entry: (-entry[0], -entry[1]))
            networks.append(
                tuple(
                    Example(
                        tuple(tokenizer.decode([token]) for token in ids),
                        tuple(round(value / scale, 2) for value in activity),
                        source,
                    )
                    for _, _, ids, activity, source in ordered
                )
            )
        return Examples(tuple(networks), self.tokens, tensors_sha256)
