"""Forward interventions: lesion (zero the selected neurons) and preserve (zero all others)."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import NeuronSite, base_model
from ..neurons.taps import checking, tapping


class MaskHandle:
    """Hooks that silence neurons, switched on. Also a context manager that removes them at its end.

    The hooks are registered once and switched by a flag: a compiled model is compiled once for each state of it. They
    keep no state between calls, so they may run twice in a step under gradient checkpointing. After `remove`, `enable`
    and a `with` block register them again.

    A copy of the model (`copy.deepcopy`, pickle) carries copies of its masks, switched as they were: [`masks_of`]
    gives their handles.

    Attributes:
        silenced (`NeuronMask`): the neurons that are zeroed.
    """

    def __init__(self, model: nn.Module, silenced: NeuronMask) -> None:
        self.silenced = silenced
        self._model: weakref.ref[nn.Module] | None = weakref.ref(base_model(model))
        self._others: list[weakref.ref[nn.Module]] = []
        self._hooks: list | None = None  # `None`: not registered
        self._count = 0  # of modules that are tapped
        self._on = False
        self._blocks = 0  # `with` blocks that it is in
        self._register(model)

    @property
    def enabled(self) -> bool:
        """Whether the mask is on."""
        return self._on

    def enable(self) -> None:
        """Switch the mask on. One that was removed, or went with an adapter, is put on its model again.

        Raises:
            FNSFTError: it was removed, and its model is gone, or is a copy of the one that it was made for.
        """
        model = self._model and self._model()
        if self._hooks is None or (model is not None and self._taps(model) != self._count):
            if model is None:
                raise FNSFTError(
                    "the mask was removed, and its handle knows no model any more (that of a copy never does); make a "
                    "new one with lesion or preserve"
                )
            self.remove()
            self._register(model)
        self._on = True

    def disable(self) -> None:
        """Switch the mask off; the hooks stay."""
        self._on = False

    def extend(self, model: nn.Module) -> None:
        """Silence the same neurons in another model too; both are switched together.

        Raises:
            FNSFTError: the mask has other layers or widths than the model.
        """
        self._put_on(model)
        self._others.append(weakref.ref(base_model(model)))

    def remove(self) -> None:
        """Take the hooks away."""
        self._on = False
        for hook in self._hooks or ():
            hook.remove()
        self._hooks = None

    def _register(self, model: nn.Module) -> None:
        self._hooks = None
        self._put_on(model)
        self._count = self._taps(model)
        for other in (reference() for reference in self._others):
            if other is not None:
                self._put_on(other)
        self._on = True

    def _put_on(self, model: nn.Module) -> None:
        sites = fitting_sites(model, self.silenced)
        self._hooks = self._hooks or []
        for site in sites:
            members = self.silenced.layers.get(site.layer)
            if members is not None and members.any():
                self._hooks += site.tap(_Silence(self, members.to(_device_of(model, site))), self._is_on)

    def _taps(self, model: nn.Module) -> int:
        return sum(isinstance(function, _Silence) and function.handle is self for function in tapping(model))

    def _is_on(self) -> bool:
        return self._on

    def __getstate__(self) -> dict:
        # Hooks of modules that are gone, as a merge leaves them, cannot be copied.
        hooks = self._hooks and [h for h in self._hooks if not isinstance(h, RemovableHandle) or h.hooks_dict_ref()]
        return {**vars(self), "_hooks": hooks, "_model": None, "_others": [], "_blocks": 0}

    def __enter__(self) -> "MaskHandle":
        self.enable()
        self._blocks += 1
        return self

    def __exit__(self, *exception) -> None:
        self._blocks -= 1
        if not self._blocks:
            self.remove()


def _device_of(model: nn.Module, site: NeuronSite) -> torch.device:
    """Where a site computes, as far as its weights say it."""
    device = site.layout.slices[0].tensor(model).device
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(eq=False)
class _Silence:
    handle: MaskHandle
    members: torch.Tensor

    def __call__(self, values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None) -> torch.Tensor:
        if self.members.device != values.device:  # once, where the model has moved since
            self.members = self.members.to(values.device)
        return values.masked_fill(self.members[neurons], 0)


def masks_of(model: nn.Module) -> list[MaskHandle]:
    """The handles of all masks that are on a model, enabled or not, in no order; on a copy, its own."""
    functions = [*tapping(model), *checking(model)]
    return list({id(f.handle): f.handle for f in functions if isinstance(f, _Silence)}.values())


@contextmanager
def masks_off(model: nn.Module) -> Iterator[None]:
    """Switch all masks of a model off for a while; then each is as it was, unless it was removed meanwhile."""
    handles = [handle for handle in masks_of(model) if handle.enabled]
    for handle in handles:
        handle.disable()
    try:
        yield
    finally:
        for handle in handles:
            handle._on = handle._hooks is not None


def lesion(model: nn.Module, mask: NeuronMask) -> MaskHandle:
    """Zero the selected neurons in every forward pass, until the handle is removed or its `with` block ends.

    Args:
        model: a transformers model, plain, quantised, compiled or wrapped by PEFT (wrap first, then lesion).
        mask: the neurons to silence. Layers that the mask does not cover are untouched.

    Raises:
        FNSFTError: the mask has other layers or widths than the model.
    """
    return MaskHandle(model, mask)


def preserve(model: nn.Module, mask: NeuronMask) -> MaskHandle:
    """Zero all neurons but the selected ones, within the layers that the mask covers. See [`lesion`]."""
    return MaskHandle(model, ~mask)
