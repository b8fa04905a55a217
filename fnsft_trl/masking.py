"""Forward interventions: lesion (zero the selected neurons) and preserve (zero all others)."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import FNSFTError
from .neurons import base_model, find_neuron_sites
from .selection import NeuronMask


_HANDLES: "weakref.WeakSet[MaskHandle]" = weakref.WeakSet()


class MaskHandle:
    """Hooks that silence neurons, switched on. Also a context manager that removes them at its end.

    The hooks are registered once and switched by a flag, since a compiled model ignores hooks that come later. They
    keep no state between calls, so they may run twice in a step under gradient checkpointing.

    Attributes:
        enabled (`bool`): whether the mask is on.
        silenced (`NeuronMask`): the neurons that are zeroed.
    """

    def __init__(self, model: nn.Module, silenced: NeuronMask) -> None:
        self.enabled = True
        self.silenced = silenced
        self._model = weakref.ref(base_model(model))
        _HANDLES.add(self)
        self._hooks = []
        sites = {site.layer: site for site in find_neuron_sites(model, kind=silenced.site)}
        for layer, members in silenced.layers.items():
            found = sites[layer].width if layer in sites else None
            if found != len(members):
                raise FNSFTError(
                    f"the mask has {len(members)} neurons in layer {layer}, the model "
                    f"{'no such layer' if found is None else found}; it was made for another model"
                )
            if not members.any():
                continue
            self._hooks += sites[layer].tap(_silence(members), lambda: self.enabled)

    def enable(self) -> None:
        """Switch the mask on."""
        self.enabled = True

    def disable(self) -> None:
        """Switch the mask off; the hooks stay."""
        self.enabled = False

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "MaskHandle":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def _silence(members: torch.Tensor):
    def function(values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None) -> torch.Tensor:
        return values.masked_fill(members[neurons].to(values.device), 0)

    return function


@contextmanager
def masks_off(model: nn.Module) -> Iterator[None]:
    """Switch all masks of a model off for a while; then each is as it was."""
    handles = [handle for handle in _HANDLES if handle.enabled and handle._model() is base_model(model)]
    for handle in handles:
        handle.disable()
    try:
        yield
    finally:
        for handle in handles:
            handle.enable()


def lesion(model: nn.Module, mask: NeuronMask) -> MaskHandle:
    """Zero the selected neurons in every forward pass, until the handle is removed or its `with` block ends.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT (wrap first, then lesion).
        mask: the neurons to silence. Layers that the mask does not cover are untouched.

    Raises:
        FNSFTError: the mask has other layers or widths than the model.
    """
    return MaskHandle(model, mask)


def preserve(model: nn.Module, mask: NeuronMask) -> MaskHandle:
    """Zero all neurons but the selected ones, within the layers that the mask covers. See [`lesion`]."""
    return MaskHandle(model, ~mask)
