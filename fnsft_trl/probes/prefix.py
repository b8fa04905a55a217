"""SharedPrefix: passes of a model that begin in the middle, with what the blocks before have computed already."""

from typing import Any

import torch
from torch import nn

from ..compat.torch import guard_hooks
from ..neurons.sites import base_model, find_blocks


class SharedPrefix:
    """A model whose passes over one batch share the blocks before the first that an intervention changes.

    [`whole`] runs all blocks and keeps what each gives. [`run_from`] then runs the model again over the same inputs.
    The blocks before a layer give what they gave, without computing it. What a block gives is kept as it is, with all
    that it hands on beside the hidden states.

    Use it in a `with` block, outside of which the model is as it was.

    Args:
        model: a causal language model in evaluation mode, plain or wrapped by PEFT; not compiled.

    Attributes:
        layers (`int`): number of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._blocks = find_blocks(base_model(model))
        self.layers = len(self._blocks)
        self._given: list[Any] = []
        self._first = 0
        self._forwards: list[_Block] = []
        self._hooks: list = []

    def __enter__(self) -> "SharedPrefix":
        guard_hooks()
        self._forwards = [_Block(self, number, block) for number, block in enumerate(self._blocks)]
        return self

    def __exit__(self, *exception) -> None:
        for forward in self._forwards:
            forward.restore()
        self._forwards, self._given = [], []

    def whole(self, inputs: dict) -> torch.Tensor:
        """Logits of a pass through all blocks, shape (rows, positions, vocabulary); what they give is kept."""
        self._given, self._first = [], 0
        return self.model(**inputs).logits

    def run_from(self, layer: int, inputs: dict) -> torch.Tensor:
        """Logits of a pass over the inputs of the last [`whole`] in which only the blocks from one layer on compute.

        Args:
            layer: the first that computes; 0 for all of them.
            inputs: as they were.
        """
        self._first = layer
        try:
            return self.model(**inputs).logits
        finally:
            self._first = 0

    def give(self, number: int, forward, args: tuple, kwargs: dict) -> Any:
        """What a block gives: what it computes, or what it gave before."""
        if number < self._first:  # of all that are left out, the model goes on with the last one
            return self._given[self._first - 1]
        found = forward(*args, **kwargs)
        if number == len(self._given):  # of a whole pass
            self._given.append(found)
        return found


class _Block:
    """Stands in for the forward of a block."""

    def __init__(self, shared: SharedPrefix, number: int, block: nn.Module) -> None:
        self._shared, self._number, self._block = shared, number, block
        self._was_own = vars(block).get("forward")  # set by others on this one module, as accelerate does
        self._forward = block.forward
        block.forward = self

    def __call__(self, *args, **kwargs) -> Any:
        return self._shared.give(self._number, self._forward, args, kwargs)

    def restore(self) -> None:
        """Give the block its own forward back."""
        del self._block.forward
        if self._was_own is not None:
            self._block.forward = self._was_own
