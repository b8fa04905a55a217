"""call_with: a module called with its hooks, but with another forward; and whether its forward is its class's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ..compat.accelerate import moves_inputs
from ..compat.torch import has_hooks
from ..neurons.experts import forward_set_on


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a module computes something else than its class, so that nobody knows what a change of its weight does.

    What accelerate sets moves inputs and weights between devices, and computes the same.
    """
    return forward_set_on(module) is not None and not moves_inputs(module)


def call_with(module: nn.Module, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """What calling a module would give if its forward were another one: its hooks see what that one gets and returns.

    The module is not touched, so that other threads may call it.

    Args:
        module: the module.
        forward: takes its place.
        inputs: of the call.
    """
    if not has_hooks(module):
        return forward(*inputs)
    return _call_stand_in(module, forward, *inputs)


@torch.compiler.disable
def _call_stand_in(module: nn.Module, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    stand_in = object.__new__(_stand_in_for(type(module)))
    object.__setattr__(stand_in, "__dict__", module.__dict__)  # all that hooks read or set is the module's own
    object.__setattr__(stand_in, "stands_in", (module, forward))
    return stand_in(*inputs)


@cache
def _stand_in_for(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of modules that have everything of another module but its forward."""
    members = {
        "__slots__": ("stands_in",),
        "forward": property(lambda self: self.stands_in[1]),  # goes before one that was set on the module itself
        "__eq__": lambda self, other: other is self or other is self.stands_in[0],  # hooks look it up by itself
        "__hash__": lambda self: hash(self.stands_in[0]),
    }
    return type(cls)(cls.__name__, (cls,), members)
