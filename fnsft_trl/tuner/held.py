"""HeldWeights: the parameters of one module, which hold deltas while they are computed with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..compat.torch import is_fsdp_managed, version_counter
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice, select_positions, write_positions


_BLOCK = 512  # rows of a weight of which columns are written at once


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
# In what state the deltas were that the parameters hold: for each, which tensor, where it lies and its version.
HeldState = tuple[tuple[int, int, int], ...]


class _Entries(NamedTuple):
    """The entries of one parameter that are overwritten, and the values that they had, shape (m, ...)."""

    dims: tuple[int, ...]
    positions: torch.Tensor
    originals: torch.Tensor


class HeldWeights:
    """The parameters of a module, which hold base + deltas while they are computed with.

    `hold` overwrites the entries that have a delta and keeps their base values aside. They stay so for the next
    forward pass, until `release` puts the base values back, bit for bit.

    Threads: every write is made under a lock, so forward passes in evaluation mode may run at once in several threads.
    The first of them to reach a module after loading or `eval()` writes, once; as long as no delta changes, all others
    only read. Nothing else that writes or shows the weights may run beside them: training, a backward pass,
    `state_dict`, `release`, merging, `set_adapter`, `disable_adapter`, `train()` and `eval()`. On an accelerator,
    threads with streams of their own must wait for the stream of the first pass.

    A copy (`copy.deepcopy`, `pickle`) has a lock of its own.

    Args:
        module (`nn.Module`): the module.

    Attributes:
        names (`tuple[str, ...]`): the adapters whose deltas the parameters hold at present.
        entries (`dict[str, ...]`): parameter name -> the overwritten entries and their base values.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names: tuple[str, ...] = ()
        self.entries: dict[str, _Entries] = {}
        self._lock = threading.RLock()
        self._state: HeldState | None = ()  # of the deltas; `None` while entries are being written
        self._is_stale = False
        self._is_shown = False

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_state": None if self.entries else ()}  # a copy has other tensors
        del state["_lock"]  # and locks cannot be copied
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP manages the parameters: they look plain in a forward pass, but are gathered copies."""
        return is_fsdp_managed(self.module)

    @property
    def can_hold(self) -> bool:
        """Whether the parameters can be overwritten."""
        return not self.is_sharded and all(
            type(parameter) is nn.Parameter  # not a DTensor
            and not parameter.requires_grad
            and not parameter.is_inference()
            and parameter.device.type != "meta"  # offloaded
            for parameter in self.module.parameters(recurse=False)
        )

    @contextmanager
    def hold(self, deltas: Deltas, *, refresh: bool = False) -> Iterator[HeldState]:
        """Let the parameters hold base + deltas, for a block that computes with them.

        They hold them after the block, too.

        Args:
            deltas: the deltas.
            refresh: write even when nothing seems to have changed.

        Returns:
            A context; its value is the state of the deltas, for `take_over`.

        Raises:
            FNSFTError: the parameters were sharded while they held deltas.
        """
        with self._lock:
            state = self._bring(deltas, refresh=refresh or self._is_stale)
            if self._is_shown:  # some models read a weight in every forward pass: no other may do so in this block
                yield state
                return
        yield state

    def take_over(self, deltas: Deltas, state: HeldState) -> None:
        """Hold, for a backward pass, what its forward pass held: others may have had the parameters since.

        Args:
            deltas: the deltas that it held.
            state: their state at the time.

        Raises:
            FNSFTError: the deltas have changed since, and the values that the gradient depends on are gone.
        """
        with self._lock:
            if self._bring(deltas) != state:
                raise FNSFTError(
                    "neuron deltas were changed between a forward pass and its backward pass, which needs their "
                    "former values; call backward before the optimizer steps"
                )
            self._is_stale = True

    def release(self, merged: Deltas | None = None) -> None:
        """Put the base values back, bit for bit.

        Args:
            merged: deltas that stay.
        """
        # Asked without the lock, which a compiled forward pass must not meet: `_state` is the last thing to be set.
        if self.names != tuple(merged or ()) or self._state is None:
            self._bring(merged or {})

    def show(self) -> None:
        """Note that a weight was read: from now on until the next `expire`, blocks of `hold` run one at a time."""
        self._is_shown = True

    def expire(self) -> None:
        """Let the next `hold` write anew, whatever the deltas look like."""
        with self._lock:
            self._is_stale, self._is_shown = True, False

    def is_finite(self) -> bool:
        """Whether all entries that were overwritten are finite numbers."""
        written = (self._take(parameter, *entries[:2]) for parameter, entries in self.entries.items())
        return all(bool(torch.isfinite(rows).all()) for rows in written)

    def move(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply to the kept base values what was applied to the parameters (another device or precision)."""
        with self._lock:
            self.entries = {
                parameter: entries._replace(
                    positions=function(entries.positions), originals=function(entries.originals)
                )
                for parameter, entries in self.entries.items()
            }

    @torch.compiler.disable
    def _bring(self, deltas: Deltas, *, refresh: bool = False) -> HeldState:
        """Bring the parameters to base + deltas, if they are not there yet."""
        with self._lock:
            every = [delta.values for of_adapter in deltas.values() for delta in of_adapter]
            state = tuple((id(d), d.data_ptr(), version_counter(d)) for d in every)
            if tuple(deltas) != self.names or state != self._state or (refresh and deltas):
                self._write(deltas)
                self._state, self._is_stale = state, False
            return state

    @torch.no_grad()
    def _write(self, deltas: Deltas) -> None:
        if self.is_sharded:
            raise FNSFTError(
                "the model was sharded while its weights held neuron deltas, so the base values cannot be put back; "
                "call model.base_model.release() before sharding it"
            )
        self._state = None  # so that after an interruption (Ctrl-C, no memory left) all of this is done again
        changes: dict[str, list[Delta]] = {}  # parameter name -> its deltas, one for each adapter that has any
        for delta in (delta for of_adapter in deltas.values() for delta in of_adapter):
            changes.setdefault(delta.slice_.parameter, []).append(delta)
        if self.names != tuple(deltas):
            for parameter, entries in self.entries.items():
                self._put(parameter, entries, entries.originals)
            self.names, self.entries = (), {}
            for parameter, (first, *others) in changes.items():
                dims, positions = first.slice_.dims, first.positions
                if others:
                    positions = torch.cat([positions, *(delta.positions for delta in others)]).unique()
                self.entries[parameter] = _Entries(dims, positions, self._take(parameter, dims, positions))
            self.names = tuple(deltas)  # from here on entries are overwritten
        for parameter, entries in self.entries.items():
            self._put(parameter, entries, _sum(entries, changes.get(parameter, [])))

    def _take(self, parameter: str, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
        """The entries of a parameter at some positions, one row for each."""
        return select_positions(getattr(self.module, parameter), dims, positions).contiguous()

    def _put(self, parameter: str, entries: _Entries, rows: torch.Tensor) -> None:
        """The inverse of `_take`."""
        values, (dims, positions, _) = getattr(self.module, parameter), entries
        rows = rows.to(values.dtype)
        if dims != (1,) or values.dim() != 2:
            write_positions(values, dims, positions, rows)
            return
        # Copying columns from a transposed view takes many times as long as transposing first, in blocks that stay in
        # the processor's cache.
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            values[block].index_copy_(1, positions, rows[:, block].T.contiguous())


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
