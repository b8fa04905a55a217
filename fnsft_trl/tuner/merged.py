"""MergedWeights: the parameters of one module, into which deltas are merged until they are taken out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..compat.torch import is_fsdp_managed
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice, select_positions, write_positions


class Delta(NamedTuple):
    """The change that one adapter makes to one parameter.

    Attributes:
        slice_ (`WeightSlice`): where neurons are in the parameter.
        positions (`torch.Tensor`): the positions that change, in the order of the rows, shape (m,).
        values (`nn.Parameter`): what is added there, one row for each position, shape (m, ...).
    """

    slice_: WeightSlice
    positions: torch.Tensor
    values: nn.Parameter


# Adapter name -> its deltas; of one layer, the weight's before the bias's.
Deltas = dict[str, list[Delta]]


class _Entries(NamedTuple):
    """The entries of one parameter that are overwritten, and the values that they had, shape (m, ...)."""

    dims: tuple[int, ...]
    positions: torch.Tensor
    originals: torch.Tensor


class MergedWeights:
    """The parameters of a module with merged deltas, and the base values of what was overwritten.

    Args:
        module (`nn.Module`): the module.

    Attributes:
        entries (`dict[str, ...]`): parameter name -> the overwritten entries and their base values.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: dict[str, _Entries] = {}
        self._written: dict[str, int] | None = {}  # sums of the bits; `None` while entries are being written

    @property
    def is_torn(self) -> bool:
        """Whether an interruption has left them in the middle of being written."""
        return self._written is None

    @torch.no_grad()
    def merge(self, deltas: Deltas) -> None:
        """Bring the parameters to base + deltas, whatever was merged before: added up at no less than the precision of
        the deltas, and rounded once.

        Args:
            deltas: all that shall be merged; without any, the base values come back, bit for bit.

        Raises:
            FNSFTError: someone else has written to what was overwritten, so that putting the base values back would
                undo it.
        """
        self._check()
        self._written = None  # so that after an interruption (Ctrl-C, no memory left) all of this is done again
        for parameter, entries in self.entries.items():
            self._put(parameter, entries, entries.originals)
        self.entries = {}
        changes: dict[str, list[Delta]] = {}  # parameter name -> its deltas, one for each adapter that has any
        for delta in (delta for of_adapter in deltas.values() for delta in of_adapter):
            changes.setdefault(delta.slice_.parameter, []).append(delta)
        taken = {}
        for parameter, (first, *others) in changes.items():
            dims, positions = first.slice_.dims, first.positions
            if others:
                positions = torch.cat([positions, *(delta.positions for delta in others)]).unique()
            taken[parameter] = _Entries(dims, positions, self._take(parameter, dims, positions))
        self.entries = taken  # from here on entries are overwritten
        for parameter, entries in taken.items():
            self._put(parameter, entries, _sum(entries, changes[parameter]))
        self._written = self._sums()

    def is_finite(self) -> bool:
        """Whether all entries that were overwritten are finite numbers."""
        written = (self._take(parameter, *entries[:2]) for parameter, entries in self.entries.items())
        return all(bool(torch.isfinite(rows).all()) for rows in written)

    def move(self, function: Callable[[torch.Tensor], torch.Tensor], apply: Callable[[], None]) -> None:
        """Change the parameters and, in the same way, the kept base values (another device or precision).

        Args:
            function: what becomes of a tensor.
            apply: does it to the parameters.
        """
        self._check()
        apply()
        self.entries = {
            parameter: entries._replace(positions=function(entries.positions), originals=function(entries.originals))
            for parameter, entries in self.entries.items()
        }
        if self._written is not None:
            self._written = self._sums()

    def _check(self) -> None:
        if self._written and (is_fsdp_managed(self.module) or self._written != self._sums()):
            raise FNSFTError(
                f"the weights of a {type(self.module).__name__} were changed while neuron deltas were merged into "
                "them, so the base values cannot be put back; unmerge before loading, editing or sharding weights"
            )

    def _sums(self) -> dict[str, int]:
        sums = {}
        for parameter, entries in self.entries.items():
            rows = self._take(parameter, *entries[:2])
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize]
            sums[parameter] = int(rows.view(bits).sum(dtype=torch.int64))
        return sums

    def _take(self, parameter: str, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
        """The entries of a parameter at some positions, one row for each."""
        return select_positions(getattr(self.module, parameter), dims, positions).contiguous()

    def _put(self, parameter: str, entries: _Entries, rows: torch.Tensor) -> None:
        """The inverse of `_take`."""
        values = getattr(self.module, parameter)
        write_positions(values, entries.dims, entries.positions, rows.to(values.dtype))


def _sum(entries: _Entries, deltas: list[Delta]) -> torch.Tensor:
    """Base values plus deltas, at the higher of their precisions, shape (m, ...)."""
    rows = entries.originals
    if len(deltas) == 1:
        return rows + deltas[0].values.view_as(rows)
    for delta in deltas:
        rows = rows.to(torch.promote_types(rows.dtype, delta.values.dtype))
        where = torch.searchsorted(entries.positions, delta.positions)
        rows = rows.index_add(0, where, delta.values.to(rows.dtype).view(-1, *rows.shape[1:]))
    return rows
