"""Taps: what calls a function on the activations of a site.

They are objects and not closures. So a copy of a model (`copy.deepcopy`, pickle) gets copies of them, with copies of
what they refer to: the state of the copy is its own.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..compat.peft import BaseTunerLayer
from ..compat.torch import forward_hooks
from ..errors import FNSFTError
from .experts import expert_taps


# (activations (..., m), which m neurons of the site, the tokens they are of: numbers (tokens,), or `None` for all
# tokens in order) -> the activations to go on with, or `None` to leave them.
ActivationFunction = Callable[[torch.Tensor, slice, torch.Tensor | None], torch.Tensor | None]


@dataclass(eq=False)
class InputTap:
    """A pre-hook: the function is called on what enters a module.

    Attributes:
        function (`ActivationFunction`): what is called.
        enabled (callable): asked in every pass whether to call it.
        neurons (`slice`): which neurons of the site they are.
    """

    function: ActivationFunction
    enabled: Callable[[], bool]
    neurons: slice

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        changed = self.function(args[0], self.neurons, None) if self.enabled() else None
        return None if changed is None else (changed, *args[1:])


@dataclass(eq=False)
class OutputTap:
    """A hook: the function is called on what leaves a module, of which it may be the first of several values.

    Attributes: those of [`InputTap`].
    """

    function: ActivationFunction
    enabled: Callable[[], bool]
    neurons: slice

    def __call__(self, module: nn.Module, args: tuple, output):
        if not self.enabled():
            return None
        values, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = self.function(values, self.neurons, None)
        return changed if changed is None or rest is None else (changed, *rest)


@dataclass(eq=False)
class UnitsTap:
    """The function is called on the activations of one expert.

    Attributes:
        function (`ActivationFunction`): what is called.
        units (`int`): number of neurons of one expert.
    """

    function: ActivationFunction
    units: int

    def __call__(self, values: torch.Tensor, expert: int, tokens: torch.Tensor) -> torch.Tensor | None:
        return self.function(values, slice(expert * self.units, (expert + 1) * self.units), tokens)


@dataclass(eq=False)
class WrappingCheck:
    """A pre-hook of the module around a tapped one, for when another is in its place.

    Where that is an adapter around it, the tap is inside, and what the adapter adds would go past it: the pass ends.
    Where an adapter was taken away with the tap, which a merge does, the pass goes on, and a warning says so.

    Attributes:
        name (`str`): the tapped module's name in the module around it.
        tap (`InputTap` or `OutputTap`): the tap.
    """

    name: str
    tap: InputTap | OutputTap

    def __call__(self, module: nn.Module, args: tuple) -> None:
        found = getattr(module, self.name)
        if not self.tap.enabled() or any(hook is self.tap for hook in forward_hooks(found)):
            return
        if isinstance(found, BaseTunerLayer):
            raise FNSFTError(
                f"an adapter was put around {self.name} after a mask or another hook of this package, which would not "
                "reach what the adapter adds; remove the mask, and put it on again"
            )
        warnings.warn(
            f"a mask was on the adapter around {self.name}, and went with it when that was merged or unloaded: the "
            "model runs without it; remove the mask, or put it on again",
            stacklevel=2,
        )


def tapping(model: nn.Module) -> Iterator[ActivationFunction]:
    """The functions that are called on a model's activations at present, once for each module that calls them."""
    for module in model.modules():
        taps = [*forward_hooks(module), *expert_taps(module)]
        yield from (tap.function for tap in taps if isinstance(tap, (InputTap, OutputTap, UnitsTap)))


def checking(model: nn.Module) -> Iterator[ActivationFunction]:
    """The functions that are to be called on a model's activations, even where the tapped modules are gone."""
    for module in model.modules():
        yield from (hook.tap.function for hook in forward_hooks(module) if isinstance(hook, WrappingCheck))
