"""Forward interventions: lesion (zero the selected neurons) and preserve (zero all others)."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import base_model


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
        sites = fitting_sites(model, silenced)
        self.enabled = True
        self.silenced = silenced
        self._model = weakref.ref(base_model(model))
        self._hooks = []
        for site in sites:
            members = silenced.layers.get(site.layer)
            if members is not None and members.any():
                self._hooks += site.tap(_silence(members), lambda: self.enabled)
        _HANDLES.add(self)

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
