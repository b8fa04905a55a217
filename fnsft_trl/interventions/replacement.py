"""Replacements: what stands in for the activations of the neurons that an intervention changes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real

import torch

from ..errors import FNSFTError


class Replacement(ABC):
    """What stands in for activations. It is kept on the device of those that it was last asked for.

    Attributes:
        is_placed (`bool`): whether it depends on where a token stands in its sequence.
    """

    is_placed = False

    @abstractmethod
    def of(
        self, layer: int, values: torch.Tensor, neurons: slice, positions: torch.Tensor | None
    ) -> torch.Tensor | float:
        """What stands in for the activations of a layer.

        Args:
            layer: its number.
            values: the activations, shape (..., m).
            neurons: which m neurons of the layer they are of.
            positions: of the tokens in their sequences, shape of `values` without its last dimension; `None` where it
                is not `is_placed`.

        Returns:
            What broadcasts to the shape of `values`.
        """

    def check(self, widths: Mapping[int, int]) -> None:  # noqa: B027
        """Check that it has what stands in for the neurons of some layers.

        Args:
            widths: layer -> number of its neurons.

        Raises:
            FNSFTError: it does not.
        """


class Zero(Replacement):
    """Nothing: the neurons are silent."""

    def of(self, layer, values, neurons, positions) -> float:
        """As [`Replacement`] says."""
        return 0.0


class Scaled(Replacement):
    """The activations, multiplied by a factor.

    Args:
        factor: 0 silences, 1 changes nothing.

    Raises:
        FNSFTError: the factor is no finite number.
    """

    def __init__(self, factor: float) -> None:
        if not isinstance(factor, Real) or not math.isfinite(factor):
            raise FNSFTError(f"the factor of an amplification is {factor!r}; it must be a finite number")
        self.factor = factor

    def of(self, layer, values, neurons, positions) -> torch.Tensor | float:
        """As [`Replacement`] says."""
        return values * self.factor if self.factor else 0.0


class _Stored(Replacement):
    """Values that are stored for each layer, the last dimension over its neurons."""

    def __init__(self, values: Mapping[int, torch.Tensor]) -> None:
        self._values = {layer: found.detach() for layer, found in values.items()}

    def check(self, widths) -> None:
        """As [`Replacement`] says."""
        for layer, width in widths.items():
            found = self._values.get(layer)
            if found is None or found.shape[-1] != width:
                has = "none" if found is None else found.shape[-1]
                raise FNSFTError(
                    f"what stands in for the {width} neurons of layer {layer} has {has}; it was measured on another "
                    "model, or at another site"
                )

    def _like(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        found = self._values[layer]
        if found.device != values.device or found.dtype != values.dtype:  # once, where the model is or has moved to
            found = self._values[layer] = found.to(values)
        return found


class Mean(_Stored):
    """The mean of each neuron, so that what is taken away is how it differs from token to token.

    Args:
        means (mapping): layer -> shape (neurons,), such as the `mean` of a template.
    """

    def of(self, layer, values, neurons, positions) -> torch.Tensor:
        """As [`Replacement`] says."""
        return self._like(layer, values)[neurons]


class Resampled(_Stored):
    """What the neurons were at other tokens: as loud as they are, and about something else.

    Which token it is depends on the position in the sequence alone, and is the same in all layers. So a pass in pieces
    (a KV cache) computes what one pass does.

    Args:
        pool (mapping): layer -> activations of the same tokens, shape (tokens, neurons).
        seed: of the order of these tokens.
    """

    is_placed = True

    def __init__(self, pool: Mapping[int, torch.Tensor], *, seed: int = 0) -> None:
        count = min(map(len, pool.values()), default=0)
        if count < 2:
            raise FNSFTError(f"activations of {count} tokens are no pool to draw from; give those of two or more")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        super().__init__({layer: found[order.to(found.device)] for layer, found in pool.items()})

    def of(self, layer, values, neurons, positions) -> torch.Tensor:
        """As [`Replacement`] says."""
        found = self._like(layer, values)
        return found[positions % len(found), neurons]
