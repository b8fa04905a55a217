"""LinearDeltaLayer: one linear layer with a delta for some of its neurons."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import Conv1D

from ..neurons.layout import WeightSlice
from ..neurons.sites import linear_shape
from .held import Deltas, HeldState
from .layer import NeuronDeltaLayer


class LinearDeltaLayer(NeuronDeltaLayer):
    """A linear layer whose selected neurons carry a delta.

    With W the base weight of shape (out, in), S the selected positions and D the delta:

        neurons are outputs:  y = W x + b;  y[S] += D x + d     D: (positions, in), d: (positions,)
        neurons are inputs:   y = W x + b + D^T x[S]            D: (positions, out)
    """

    adapter_layer_names = ("neuron_delta_weight", "neuron_delta_bias")
    other_param_names = ("positions_weight", "positions_bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deltas, is_held = self._prepare()
        if not is_held:
            result = self.base_layer(x)
            for weight, *bias in deltas.values():
                values = [delta.values for delta in (weight, *bias)]
                result = add_change(result, x, weight.slice_.side, weight.positions, *values)
            return result
        # A fused or 8-bit optimizer changes the deltas without leaving a trace in their version counters, so they are
        # written anew in training.
        with self.held.hold(deltas, refresh=self.training) as state:
            if not torch.is_grad_enabled():
                return self.base_layer(x)
            values = (delta.values for of_adapter in deltas.values() for delta in of_adapter)
            return _HeldLinear.apply(self, deltas, state, x, *values)

    def _can_hold(self) -> bool:
        # A subclass may be quantised or compute something else.
        return type(self.base_layer) in (nn.Linear, Conv1D) and super()._can_hold()

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
        self.held.show()
        self.release()
        return super().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base bias, without the deltas of adapters that are not merged."""
        self.held.show()
        self.release()
        return super().bias


def add_change(
    result: torch.Tensor,
    x: torch.Tensor,
    side: str,
    positions: torch.Tensor,
    delta: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The additive form of one delta: the output of a linear layer, with the change that the delta makes.

    Args:
        result: the output without it, shape (..., out).
        x: the input, shape (..., in).
        side: whether the neurons are the layer's `"output"` or its `"input"`.
        positions: of the neurons, shape (m,).
        delta: shape (m, in), or (m, out) when they are inputs.
        bias: change of the bias at the positions, shape (m,).
    """
    if side == "output":
        change = nn.functional.linear(x.to(delta.dtype), delta, bias)  # (..., m)
        return result.index_add(-1, positions, change.to(result.dtype))
    change = x.index_select(-1, positions).to(delta.dtype) @ delta  # (..., out)
    return result + change.to(result.dtype)


def change_gradients(
    side: str, positions: torch.Tensor, kept: torch.Tensor, grad: torch.Tensor, has_bias: bool
) -> list[torch.Tensor]:
    """Gradients of one delta, of its shape, and of its bias, shape (m,), if there is one.

    Args:
        side: whether the neurons are the layer's `"output"` or its `"input"`.
        positions: of the neurons, shape (m,).
        kept: the input of the layer, (tokens, in); at the positions alone, (tokens, m), when neurons are inputs.
        grad: gradient of the output, shape (tokens, out).
        has_bias: whether the delta has one.
    """
    if side == "input":
        return [kept.T @ grad]
    selected = grad.index_select(-1, positions)  # (tokens, m)
    return [selected.T @ kept, selected.sum(0)] if has_bias else [selected.T @ kept]


class _HeldLinear(torch.autograd.Function):
    """The base layer with deltas held in its weight; gradients for the input and the deltas, and nothing else.

    With G the gradient of y, shape (tokens, out):

        x: G W      D: G[:, S]^T x (neurons are outputs), x[:, S]^T G (inputs)      d: the sum of G[:, S] over tokens

    So the backward pass keeps x once for all layers that read it (outputs), or x[:, S] alone (inputs).
    """

    @staticmethod
    def forward(
        ctx, layer: LinearDeltaLayer, deltas: Deltas, state: HeldState, x: torch.Tensor, *values: torch.Tensor
    ):
        ctx.layer, ctx.names, ctx.state = layer, tuple(deltas), state
        kept = []
        for weight, *bias in deltas.values():
            if any(delta.values.requires_grad for delta in (weight, *bias)):
                kept.append(x if weight.slice_.side == "output" else x.index_select(-1, weight.positions))
            else:
                kept.append(None)
        ctx.save_for_backward(*kept)
        return layer.base_layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Gradients for x and for the deltas that train, `None` for all else."""
        layer: LinearDeltaLayer = ctx.layer
        deltas = layer._deltas(ctx.names)  # as they are now: with other tensors in their place, this is an error
        layer.held.take_over(deltas, ctx.state)
        grad_x = None
        if ctx.needs_input_grad[3]:
            weight = layer.base_layer.weight.to(grad.dtype)
            grad_x = grad @ (weight.T if isinstance(layer.base_layer, Conv1D) else weight)
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grads: list[torch.Tensor | None] = []
        for of_adapter, kept in zip(deltas.values(), ctx.saved_tensors, strict=True):
            if kept is None:
                grads += [None] * len(of_adapter)
                continue
            kept = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)
            first = of_adapter[0]
            found = change_gradients(first.slice_.side, first.positions, kept, grad, len(of_adapter) == 2)
            grads += [g.to(delta.values.dtype) for g, delta in zip(found, of_adapter, strict=True)]
        return None, None, None, grad_x, *grads
