"""Single neurons: the K of the largest first-order effect on the loss, each as a mask of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..compat.accelerate import input_device
from ..compat.torch import exact
from ..evaluation.metrics import model_inputs
from ..finite import check_finite
from ..neurons.mask import NeuronMask
from ..neurons.sites import find_neuron_sites
from .data import Item, ProbeData


@dataclass(frozen=True)
class SingleNeuron:
    """One neuron.

    Attributes:
        layer (`int`), neuron (`int`): which.
        estimate (`float`): first-order rise of the cross-entropy when it is silenced, in nats per token.
        mask (`NeuronMask`): it alone.
    """

    layer: int
    neuron: int
    estimate: float
    mask: NeuronMask

    @property
    def label(self) -> str:
        """As `layer:neuron`."""
        return f"{self.layer}:{self.neuron}"


def first_order_effects(
    model: nn.Module, data: Sequence[ProbeData], *, site: str, layers: Sequence[int], batch_size: int
) -> dict[int, torch.Tensor]:
    """What silencing each neuron does to the cross-entropy, to first order: minus activation times gradient.

    The sum over all tokens of -a dL/da, in nats per scored token of all data: layer -> shape (neurons,), float64.

    Args:
        model: in evaluation mode.
        data: what the loss is taken on.
        site: the kind of the sites.
        layers: which.
        batch_size: sequences in a pass.

    Raises:
        FNSFTError: one is NaN or infinite.
    """
    sites = [each for each in find_neuron_sites(model, kind=site) if each.layer in layers]
    sums = {each.layer: torch.zeros(each.width, dtype=torch.float64) for each in sites}
    batches = [batch for part in data for batch in part.batches(batch_size)]
    tokens = sum(part.tokens for part in data)
    for batch in tqdm(batches, desc="first-order effects", unit="batch"):
        for layer, neurons, effects in _batch(model, batch, sites):
            sums[layer][neurons] += effects
    for layer, values in sums.items():
        check_finite(values.tolist(), f"first-order effects of the neurons of layer {layer}")
    return {layer: values / tokens for layer, values in sums.items()}


def strongest(effects: dict[int, torch.Tensor], count: int, site: str) -> list[SingleNeuron]:
    """The neurons of the largest absolute first-order effect, the largest first."""
    layers = list(effects)
    widths = [len(effects[layer]) for layer in layers]
    pooled = torch.cat([effects[layer] for layer in layers])
    empty = {layer: torch.zeros(width, dtype=torch.bool) for layer, width in zip(layers, widths, strict=True)}
    found = []
    for place in pooled.abs().argsort(descending=True, stable=True)[:count].tolist():
        estimate, number = float(pooled[place]), 0
        while place >= widths[number]:
            place, number = place - widths[number], number + 1
        chosen = torch.zeros(widths[number], dtype=torch.bool)
        chosen[place] = True
        mask = NeuronMask({**empty, layers[number]: chosen}, site)
        found.append(SingleNeuron(layers[number], place, estimate, mask))
    return found


def _batch(model: nn.Module, batch: Sequence[Item], sites: Sequence):
    """Yield layer, neurons and effects, summed over a batch."""
    taken: list[tuple[int, slice, torch.Tensor]] = []
    handles = []
    for site in sites:

        def note(values, neurons, tokens, layer=site.layer):
            kept = values.detach().requires_grad_(True) if not values.requires_grad else values
            kept.retain_grad()
            taken.append((layer, neurons, kept))
            return kept

        handles += site.tap(note)
    try:
        with torch.enable_grad():
            _loss(model, batch).backward(inputs=[values for _, _, values in taken])
    finally:
        for handle in handles:
            handle.remove()
    for layer, neurons, values in taken:
        # In float16, products of small gradients would be 0.
        effect = -(values.detach().float() * values.grad.float()).reshape(-1, values.shape[-1])
        yield layer, neurons, exact(effect).sum(0).cpu()


def _loss(model: nn.Module, batch: Sequence[Item]) -> torch.Tensor:
    """Cross-entropy of the tokens that count, summed."""
    inputs = model_inputs([item.ids for item in batch], input_device(model))
    logits = model(**inputs).logits
    losses = []
    for row, item in enumerate(batch):
        if item.counts:
            start, end = item.scored
            losses.append(
                nn.functional.cross_entropy(
                    logits[row, start - 1 : end - 1].float(), inputs["input_ids"][row, start:end], reduction="sum"
                )
            )
    return torch.stack(losses).sum() if losses else logits.sum() * 0
