"""Forward interventions: lesion (silence neurons), preserve (silence all others), amplify (scale them)."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask, check_mask, fitting_sites
from ..neurons.sites import NeuronSite, base_model
from ..neurons.taps import checking, tapping
from .places import TokenPlaces
from .replacement import Replacement, Scaled, Zero


MASK_MODES = ("lesion", "preserve", "amplify")


class MaskHandle:
    """Hooks that change the activations of neurons, switched on. Also a context manager that removes them at its end.

    The hooks are registered once and switched by a flag: a compiled model is compiled once for each state of it. They
    keep no state between calls, so they may run twice in a step under gradient checkpointing. After `remove`, `enable`
    and a `with` block register them again.

    A copy of the model (`copy.deepcopy`, pickle) carries copies of its masks, switched as they were: [`masks_of`]
    gives their handles.

    Attributes:
        neurons (`NeuronMask`): the neurons that are changed.
        replacement (`Replacement`): what stands in for their activations.
    """

    def __init__(self, model: nn.Module, neurons: NeuronMask, replacement: Replacement) -> None:
        self.neurons, self.replacement = neurons, replacement
        self._places: TokenPlaces | None = None
        self._first: int | Sequence[int] | None = None
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

    def start_at(self, first: int | Sequence[int] | None) -> None:
        """Change only tokens from a position on, such as those that an answer is computed at.

        In a generation with prompts of one width, padded on the left, that is the width less 1: the last token of the
        prompt predicts the first of the answer.

        Args:
            first: the first position to change, padding counted, of all rows or of each; `None` for all tokens.

        Raises:
            FNSFTError: the model is an encoder with a decoder.
        """
        model = self._model and self._model()
        if self._places is None and model is not None:
            self._places = TokenPlaces(model)
            self._hooks = [*(self._hooks or []), self._places.hook]
        self._first = self._places.first = first

    def extend(self, model: nn.Module) -> None:
        """Change the same neurons in another model too; both are switched together.

        Raises:
            FNSFTError: the mask has other layers or widths than the model.
        """
        if self._places is not None:
            raise FNSFTError("a mask that depends on where tokens stand follows the passes of one model only")
        self._put_on(model)
        self._others.append(weakref.ref(base_model(model)))

    def remove(self) -> None:
        """Take the hooks away."""
        self._on = False
        for hook in self._hooks or ():
            hook.remove()
        self._hooks, self._places = None, None

    def _register(self, model: nn.Module) -> None:
        self._hooks, self._places = None, None
        self._put_on(model)
        self._count = self._taps(model)
        for other in (reference() for reference in self._others):
            if other is not None:
                self._put_on(other)
        self._on = True

    def _put_on(self, model: nn.Module) -> None:
        sites = fitting_sites(model, self.neurons)
        changed = {layer: members for layer, members in self.neurons.layers.items() if members.any()}
        self.replacement.check({layer: len(members) for layer, members in changed.items()})
        self._hooks = self._hooks or []
        if self.replacement.is_placed or self._first is not None:
            self.start_at(self._first)
        for site in sites:
            if site.layer in changed:
                tap = _Change(self, site.layer, changed[site.layer].to(_device_of(model, site)))
                self._hooks += site.tap(tap, self._is_on)

    def _taps(self, model: nn.Module) -> int:
        return sum(isinstance(function, _Change) and function.handle is self for function in tapping(model))

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
class _Change:
    handle: MaskHandle
    layer: int
    members: torch.Tensor

    def __call__(self, values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None) -> torch.Tensor:
        if self.members.device != values.device:  # once, where the model has moved since
            self.members = self.members.to(values.device)
        return changed_values(
            values, self.members[neurons], self.layer, neurons, self.handle.replacement, self.handle._places, tokens
        )


def changed_values(
    values: torch.Tensor,
    members: torch.Tensor,
    layer: int,
    neurons: slice,
    replacement: Replacement,
    places: TokenPlaces | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activations in which those of some neurons are replaced.

    Args:
        values: shape (..., m).
        members: which of the m neurons are changed, shape (m,).
        layer, neurons: of which layer, and which of its neurons they are.
        replacement: what stands in for them.
        places: where the tokens stand; `None` changes all of them, by what does not depend on it.
        tokens: see [`~fnsft_trl.neurons.taps.ActivationFunction`].
    """
    positions, active = (None, None) if places is None else places.positions(values, tokens)
    other = replacement.of(layer, values, neurons, positions)
    if active is not None:
        members = members & active[..., None]
    return values.masked_fill(members, other) if isinstance(other, float) else torch.where(members, other, values)


def masks_of(model: nn.Module) -> list[MaskHandle]:
    """The handles of all masks that are on a model, enabled or not, in no order; on a copy, its own."""
    functions = [*tapping(model), *checking(model)]
    return list({id(f.handle): f.handle for f in functions if isinstance(f, _Change)}.values())


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


def lesion(model: nn.Module, mask: NeuronMask, *, ablation: Replacement | None = None) -> MaskHandle:
    """Silence the selected neurons in every forward pass, until the handle is removed or its `with` block ends.

    Args:
        model: a transformers model, plain, quantised, compiled or wrapped by PEFT (wrap first, then lesion).
        mask: the neurons to silence. Layers that the mask does not cover are untouched.
        ablation: what stands in for their activations: [`Zero`] by default, which for a neuron with a mean is far from
            anything that it ever is, [`Mean`] or [`Resampled`]. Of routed experts, the tokens that reach an expert.

    Raises:
        FNSFTError: the mask, or the ablation, has other layers or widths than the model.
    """
    return MaskHandle(model, mask, Zero() if ablation is None else ablation)


def preserve(model: nn.Module, mask: NeuronMask, *, ablation: Replacement | None = None) -> MaskHandle:
    """Silence all neurons but the selected ones, within the layers that the mask covers. See [`lesion`]."""
    check_mask(mask)
    return lesion(model, ~mask, ablation=ablation)


def amplify(model: nn.Module, mask: NeuronMask, factor: float) -> MaskHandle:
    """Multiply the activations of the selected neurons in every forward pass.

    Args:
        model, mask: as of [`lesion`].
        factor: above 1 amplifies, below 1 inhibits; 0 is the lesion, 1 changes nothing.

    Raises:
        FNSFTError: the mask has other layers or widths than the model, or the factor is not finite.
    """
    return MaskHandle(model, mask, Scaled(factor))


def forward_mask(model: nn.Module, mode: str, mask: NeuronMask, *, factor: float | None = None) -> MaskHandle:
    """The intervention of a `mask_mode`.

    Args:
        model, mask: as of [`lesion`].
        mode: one of `MASK_MODES`.
        factor: of `"amplify"`.
    """
    if mode == "amplify":
        return amplify(model, mask, factor)
    return (lesion if mode == "lesion" else preserve)(model, mask)
