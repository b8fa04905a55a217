"""HeldWeights: the parameters of one module, which hold deltas for as long as one product takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..compat.deepspeed import is_partitioned
from ..compat.torch import has_hooks, is_fsdp_managed, is_transformed, multiplies_exactly


class Write(NamedTuple):
    """What is added to some rows or columns of a matrix, or to entries of a vector.

    Attributes:
        tensor (`torch.Tensor`): a parameter, or a view of it.
        dim (`int`): the dimension that the positions are of.
        positions (`torch.Tensor`): shape (m,).
        values (`torch.Tensor`): one row for each position, shape (m, ...).
    """

    tensor: torch.Tensor
    dim: int
    positions: torch.Tensor
    values: torch.Tensor


class HeldWeights:
    """The parameters of a module, which hold base + delta while a product with them is computed, and at no other time.

    They are written where only this package looks: in place, under a lock, and back bit for bit. Their version
    counters show no trace of it. What others keep of them for a backward pass stays valid, since the base values are
    back before anyone reads them. After an interruption (Ctrl-C, no memory left) in the middle of putting them back,
    `release` finishes it; so does the next `hold`.

    A copy (`copy.deepcopy`, `pickle`) has a lock of its own.

    Args:
        module (`nn.Module`): the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._lock = threading.RLock()
        self._kept: list[Write] = []  # what was there before, in the order of writing

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_kept": []}  # whoever copies has released
        del state["_lock"]  # locks cannot be copied
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def can_hold(self, names: list[str], x: torch.Tensor) -> bool:
        """Whether parameters can be overwritten, and a product with x then is what it is with base + delta.

        Only those of a plain module that nobody else touches. And only where products have all bits of base + delta:
        where their factors are rounded (half precision, autocast, TF32), a delta that is small beside its weight is
        rounded away.

        Args:
            names: of the parameters.
            x: the input.
        """
        if torch.compiler.is_compiling() or is_fsdp_managed(self.module) or has_hooks(self.module) or is_transformed():
            return False
        if type(x) not in (torch.Tensor, nn.Parameter) or not multiplies_exactly(x):
            return False
        return all(
            type(tensor) is nn.Parameter  # not computed from others, not a DTensor, not replaced for one call
            and (tensor.dtype, tensor.device) == (x.dtype, x.device)
            and not tensor.requires_grad
            and not tensor.is_inference()
            and not is_partitioned(tensor)
            for tensor in (getattr(self.module, name) for name in names)
        )

    @contextmanager
    def hold(self, writes: list[Write]) -> Iterator[None]:
        """Let the parameters hold base + delta in a block, in which no gradients are recorded."""
        with self._lock:
            self.release()
            try:
                for tensor, dim, positions, values in writes:
                    target = tensor.data  # leaves no trace in the version counter
                    rows = target.index_select(dim, positions)
                    self._kept.append(Write(target, dim, positions, rows))
                    target.index_add_(dim, positions, values.to(target.dtype).movedim(0, dim))
                yield
            finally:
                self.release()

    def release(self) -> None:
        """Put the base values back, bit for bit, if an interruption has left others."""
        if not self._kept:
            return
        with self._lock:
            while self._kept:
                target, dim, positions, rows = self._kept[-1]
                target.index_copy_(dim, positions, rows)
                self._kept.pop()
