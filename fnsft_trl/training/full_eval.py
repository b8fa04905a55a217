"""weights_kept: a model's weights are after a block what they were before it, whatever the block casts them to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..tuner import NeuronDeltaLayer


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back, bit for bit and on their device, after a block that casts or moves the model.

    Nothing is copied: the tensors of before are held meanwhile, beside those that the block makes of them.

    Args:
        model: not sharded.
    """
    layers = [module for module in model.modules() if isinstance(module, NeuronDeltaLayer)]
    for layer in layers:
        layer.release()
    merged = [dict(vars(layer.merging)) for layer in layers]  # what deltas are merged into, and its base values
    kept = [
        _Kept(module, name, tensor)
        for module in model.modules()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in named
    ]
    try:
        yield
    finally:
        for layer in layers:
            layer.release()
        for each in kept:
            each.restore()
        for layer, of_layer in zip(layers, merged, strict=True):
            vars(layer.merging).update(of_layer)


class _Kept:
    """A parameter or a buffer of a module, and what it holds."""

    def __init__(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        self.module, self.name, self.tensor, self.data, self.grad = module, name, tensor, tensor.data, tensor.grad
        self.grad_data = None if tensor.grad is None else tensor.grad.data

    def restore(self) -> None:
        """Put it back into its module, as it was."""
        self.tensor.grad = None  # which must have the precision of the data
        self.tensor.data = self.data
        if self.grad is not None:
            self.grad.data = self.grad_data
            self.tensor.grad = self.grad
        if getattr(self.module, self.name) is not self.tensor:
            setattr(self.module, self.name, self.tensor)
