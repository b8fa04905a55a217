"""Switch: one set of taps on a model, and what they change, set from pass to pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import FNSFTError
from ..interventions.masking import changed_values
from ..interventions.places import TokenPlaces
from ..interventions.replacement import Replacement
from ..neurons.mask import NeuronMask, fitting_sites


@dataclass(frozen=True, eq=False)
class Change:
    """What an intervention does.

    Attributes:
        members (`dict[int, torch.Tensor]`): layer -> which of its neurons are changed, on the device of the layer
            from its first pass on; layers without any are left out.
        replacement (`Replacement`): what stands in for their activations.
    """

    members: dict[int, torch.Tensor] = field(repr=False)
    replacement: Replacement

    @property
    def first_layer(self) -> int:
        """The first layer that it changes."""
        return min(self.members)


class Switch:
    """Taps on all sites of a model, registered once, in a `with` block. What they change is set with [`set`].

    Each set of neurons goes to the devices of its layers once, in its first pass, and is not copied again.

    Args:
        model: a causal language model.
        site: the kind of its sites.
        at_answers (`bool`): whether only tokens from a position on are changed, see [`set`].
        is_placed (`bool`): whether a replacement will depend on where a token stands.
    """

    def __init__(self, model: nn.Module, site: str, *, at_answers: bool = False, is_placed: bool = False) -> None:
        self.model, self._site = model, site
        self._follows = at_answers or is_placed
        self._places: TokenPlaces | None = None
        self._hooks: list = []
        self._change: Change | None = None

    def __enter__(self) -> "Switch":
        if self._follows:
            self._places = TokenPlaces(self.model)
            self._hooks = [self._places.hook]
        for site in fitting_sites(self.model, NeuronMask({}, self._site)):
            self._hooks += site.tap(_Tap(self, site.layer), self._is_on)
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._change = [], None

    def prepared(self, mask: NeuronMask, replacement: Replacement) -> Change:
        """A set of neurons, and what stands in for them.

        Raises:
            FNSFTError: the mask is of another model, or changes nothing.
        """
        fitting_sites(self.model, mask)
        members = {layer: found for layer, found in mask.layers.items() if found.any()}
        if not members:
            raise FNSFTError("a mask without neurons changes nothing; give one with some")
        replacement.check({layer: len(found) for layer, found in members.items()})
        return Change(members, replacement)

    def set(self, change: Change | None, first: int | Sequence[int] | None = None) -> None:
        """Change these neurons from the next pass on.

        Args:
            change: of [`prepared`]; `None` for nothing.
            first: the first position to change, of all rows or of each, where only answers are changed.
        """
        self._change = change
        if self._places is not None:
            self._places.first = first

    def _is_on(self) -> bool:
        return self._change is not None

    def changed(self, layer: int, values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None):
        """The activations to go on with; `None` to leave them."""
        members = self._change.members
        if layer not in members:
            return None
        if members[layer].device != values.device:  # once
            members[layer] = members[layer].to(values.device)
        return changed_values(
            values, members[layer][neurons], layer, neurons, self._change.replacement, self._places, tokens
        )


@dataclass(eq=False)
class _Tap:
    switch: Switch
    layer: int

    def __call__(self, values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None) -> torch.Tensor | None:
        return self.switch.changed(self.layer, values, neurons, tokens)
