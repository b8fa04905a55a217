"""SiteBases: directions of the inputs of MLPs, read in the same pass as their networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ..errors import FNSFTError
from ..neurons.sites import base_model, linear_shape
from .activations import ActivationReader
from .directions import InputSums


class SiteBases:
    """Sums over the inputs of each site's down and up projections, from which their directions are found.

    Args:
        reader: of the activations, at sites without experts; it says which text a forward pass reads.
        sources: how many texts are read; each counts alike, however long it is.
        leading: how many leading directions are found, beside position 0 and the mean.

    Raises:
        FNSFTError: a site has experts.
    """

    def __init__(self, reader: ActivationReader, *, sources: int, leading: int) -> None:
        self.reader, self.leading, sites = reader, leading, reader.sites
        if experts := [site for site in sites if site.experts]:
            raise FNSFTError(
                f"ica_store_basis finds directions of inputs that all tokens have, and layer {experts[0].layer} has "
                "experts; leave ica_store_basis out, or such layers (ica_layers)"
            )
        self.sums = [
            {
                (site.layer, side): InputSums(linear_shape(module)[0], leading)
                for site in sites
                for side, module in (("basis", site.down), ("input_basis", site.ups[0]))
            }
            for _ in range(sources)
        ]
        for each in (each for sums in self.sums for each in sums.values()):
            each.begin(reader.device)
        self._rows: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Add what the forward passes in a block give the projections."""
        backbone = base_model(model).base_model
        handles = [backbone.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for site in self.reader.sites:
            handles.append(site.down.register_forward_pre_hook(self._adder((site.layer, "basis"))))
            handles.append(site.ups[0].register_forward_pre_hook(self._adder((site.layer, "input_basis"))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        present = kwargs["attention_mask"].bool().clone()
        first = torch.arange(len(present), device=present.device) * present.shape[1]
        present[:, 0] = False
        self._rows = first, present.flatten().nonzero().flatten()

    def _adder(self, key: tuple[int, str]):
        def add(module: nn.Module, args: tuple) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            first, others = (each.to(rows.device) for each in self._rows)
            self.sums[self.reader.source][key].add(rows[first], rows[others], 1.0, 1.0)

        return add

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All sums as tensors."""
        return {
            f"{source}.{layer}.{side}.{name}": value
            for source, sums in enumerate(self.sums)
            for (layer, side), each in sums.items()
            for name, value in each.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over sums."""
        for source, sums in enumerate(self.sums):
            for (layer, side), each in sums.items():
                start = f"{source}.{layer}.{side}."
                each.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})

    def directions(self, others: Sequence[SiteBases] = ()) -> dict[int, dict[str, torch.Tensor]]:
        """Layer -> `basis` and `input_basis`, each of shape (directions, width), orthonormal, float32.

        Args:
            others: sums of other processes.
        """
        found: dict[int, dict[str, torch.Tensor]] = {}
        for layer, side in self.sums[0]:
            parts = []
            for source in range(len(self.sums)):
                of_source = [each.sums[source][layer, side] for each in (self, *others)]
                parts.append([each for each in of_source if each.tokens])
            name = f"the projections of layer {layer}"
            basis, _ = InputSums.merged([part for part in parts if part]).directions((name,))
            found.setdefault(layer, {})[side] = basis.T.float().contiguous()
        return found

    def of_all_processes(self, share: tuple[int, int]) -> dict[int, dict[str, torch.Tensor]]:
        """[`directions`] of what all processes have read, the same in each.

        Args:
            share: (i, n): this is process i of n.
        """
        index, count = share
        if count == 1:
            return self.directions()
        gathered: list = [None] * count
        dist.all_gather_object(gathered, self.state_dict())
        outcome = [None]
        if index == 0:
            others = [SiteBases(self.reader, sources=len(self.sums), leading=self.leading) for _ in gathered[1:]]
            for other, state in zip(others, gathered[1:], strict=True):
                other.load_state_dict(state)
            outcome = [self.directions(others)]
        dist.broadcast_object_list(outcome)
        return outcome[0]
