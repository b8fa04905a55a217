"""Activations of tokens, from which those of silenced neurons are drawn."""

from collections.abc import Sequence

import torch
from torch import nn

from ..data.sequences import TokenSequence
from ..discovery.activations import ActivationReader
from ..evaluation.metrics import evaluating
from ..neurons.sites import find_neuron_sites
from .data import ProbeData


_TOKENS = 512


def activation_pool(
    model: nn.Module, data: Sequence[ProbeData], *, site: str, tokens: int = _TOKENS
) -> dict[int, torch.Tensor]:
    """Activations of some tokens of the data: layer -> shape (tokens, neurons).

    Args:
        model: the model.
        data: in turns.
        site: the kind of the sites.
        tokens: how many, at most.
    """
    sites = find_neuron_sites(model, kind=site)
    sequences = [[TokenSequence(item.ids, 0) for item in part.items] for part in data]
    longest = max(len(item.ids) for part in data for item in part.items)
    reader = ActivationReader(model, sites, batch_size=1, max_length=longest, skip_tokens=1, special_ids=())
    blocks = reader.read(sequences, max_tokens=max(2, tokens // len(data)), description="activations to draw from")
    with evaluating(model):
        rows = torch.cat([block.rows.cpu().clone() for block in blocks if len(block.rows)])
    return {layer: rows[:tokens, columns].clone() for layer, columns in reader.columns.items()}
