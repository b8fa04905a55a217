"""LinearDeltaLayer: one linear layer with a delta for some of its neurons."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from ..compat.transformers import is_deepspeed_zero3_enabled
from ..neurons.experts import forward_set_on
from ..neurons.layout import WeightSlice
from ..neurons.sites import linear_shape
from .changes import Change, add_changes, held_linear, summed_linear
from .hooks import call_with
from .layer import NeuronDeltaLayer
from .merged import Deltas


# A subclass may be quantised or compute something else, and so does another forward.
_PLAIN = {cls: cls.forward for cls in (nn.Linear, Conv1D)}


class LinearDeltaLayer(NeuronDeltaLayer):
    """A linear layer whose selected neurons carry a delta.

    With W the base weight of shape (out, in), S the selected positions and D the delta:

        neurons are outputs:  y = W x + b;  y[S] += D x + d     D: (positions, in), d: (positions,)
        neurons are inputs:   y = W x + b + D^T x[S]            D: (positions, out)
    """

    adapter_layer_names = ("neuron_delta_weight", "neuron_delta_bias")
    other_param_names = ("positions_weight", "positions_bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deltas, base = self._active_deltas(), self.base_layer
        if not deltas:
            return base(x)
        changes = [
            Change(weight.slice_.side, weight.positions, *(delta.values for delta in (weight, *bias)))
            for weight, *bias in deltas.values()
        ]
        return call_with(base, partial(self._linear, deltas, changes), x)

    def _linear(self, deltas: Deltas, changes: list[Change], x: torch.Tensor) -> torch.Tensor:
        """The base layer's forward with its changes."""
        base = self.base_layer
        if not self._is_plain():
            return add_changes(base.forward(x), x, changes)
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        if self._can_hold(deltas, x):
            return held_linear(x, changes, held=self.held, compute=base.forward, weight=weight, bias=base.bias)
        return summed_linear(x, changes, weight=weight, bias=base.bias)

    def _is_plain(self) -> bool:
        """Whether the base layer's product can be computed from its weight and bias."""
        base = self.base_layer
        return (
            _PLAIN.get(type(base)) is type(base).forward
            and forward_set_on(base) is None
            and not is_deepspeed_zero3_enabled()  # which has the whole weight for the length of a call alone
            and not isinstance(base.weight, DTensor)
        )

    def _row_shape(self, slice_: WeightSlice) -> tuple[int, ...]:
        if slice_.parameter == "bias":
            return ()
        n_in, n_out = linear_shape(self.base_layer)
        return (n_in if slice_.side == "output" else n_out,)

    def float_deltas(self) -> None:
        """As the parent's, where the base is quantised."""
        if not self.get_base_layer().weight.is_floating_point():
            super().float_deltas()

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, without the deltas of adapters that are not merged."""
        self.release()
        return super().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base bias, without the deltas of adapters that are not merged."""
        self.release()
        return super().bias
