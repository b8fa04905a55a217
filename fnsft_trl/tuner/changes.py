"""Change: what an adapter changes in one linear map, added to the map's output or held in its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .held import HeldWeights, Write


class Change(NamedTuple):
    """What one adapter changes in one linear map, that of a layer or of one expert.

    Attributes:
        side (`str`): whether the neurons are the map's `"output"` or its `"input"`.
        positions (`torch.Tensor`): of the neurons, shape (m,).
        values (`torch.Tensor`): the delta of the weight, shape (m, in), or (m, out) when neurons are inputs.
        bias (`torch.Tensor`, *optional*): the delta of the bias at the positions, shape (m,).
    """

    side: str
    positions: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None


def summed_linear(
    x: torch.Tensor, changes: list[Change], *, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The additive form of a plain linear map: what its changes add is where the sums of the product begin.

    The weight is left as it is, so no delta is too small beside it. And a sum is rounded once, so no change is too
    small beside the sum either. In half precision, a change added to a rounded sum would be lost where it is less than
    half a rounding step.

    Args:
        x: the input, shape (..., in).
        changes: the changes.
        weight: the map's weight, shape (out, in).
        bias: its bias, shape (out,).
    """
    rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
    added = [_output_change(rows, change, len(weight)) for change in changes]  # of each, (tokens, out)
    start = sum(added[1:], start=added[0])
    is_half = start.dtype.itemsize < 4  # autocast heeded
    if bias is not None and not is_half:
        start = start + bias  # where the product of a plain layer begins: zero deltas then change nothing
    result = torch.addmm(start, rows, weight.T)
    if bias is not None and is_half:
        result = result + bias.to(result.dtype)  # a change would be rounded beside it
    return result.view(*x.shape[:-1], len(weight))


def add_changes(result: torch.Tensor, x: torch.Tensor, changes: list[Change]) -> torch.Tensor:
    """The additive form of any other linear map (quantised, sharded): its output, with what its changes add to it.

    Args:
        result: the output without them, shape (..., out).
        x: the input, shape (..., in).
        changes: the changes.
    """
    rows = x.reshape(-1, x.shape[-1])
    for change in changes:
        result = result + _output_change(rows, change, result.shape[-1]).to(result.dtype).view_as(result)
    return result


def _output_change(rows: torch.Tensor, change: Change, n_out: int) -> torch.Tensor:
    """What one change adds to the output, shape (tokens, out)."""
    values = change.values.to(rows.dtype)
    if change.side == "input":
        return rows.index_select(-1, change.positions) @ values
    bias = None if change.bias is None else change.bias.to(rows.dtype)
    at_positions = nn.functional.linear(rows, values, bias)  # (tokens, m)
    return at_positions.new_zeros(len(rows), n_out).index_add(-1, change.positions, at_positions)


def held_linear(
    x: torch.Tensor,
    changes: list[Change],
    *,
    held: HeldWeights,
    compute: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The held form: the output of a linear map whose weight contains its changes for the length of the call.

    Args:
        x: the input, shape (..., in).
        changes: the changes.
        held: of the module that the map is of.
        compute: the map, which reads the module's parameters.
        weight: its weight, a parameter or a view of one, shape (out, in).
        bias: its bias, shape (out,).
    """
    where = [(side, positions, change is not None) for side, positions, _, change in changes]
    values = [tensor for change in changes for tensor in change[2:] if tensor is not None]
    return _HeldLinear.apply(held, compute, weight, bias, where, x, *values)


class _HeldLinear(torch.autograd.Function):
    """A linear map with changes held in its weight; gradients for the input and the deltas, and nothing else.

    With G the gradient of y, shape (tokens, out), and W the weight with its changes:

        x: G W      D: G[:, S]^T x (neurons are outputs), x[:, S]^T G (inputs)      d: the sum of G[:, S] over tokens

    So the backward pass keeps x once for all maps that read it (outputs), or x[:, S] alone (inputs).
    """

    @staticmethod
    def forward(ctx, held, compute, weight, bias, where, x, *values):
        ctx.held, ctx.where = held, where
        writes, kept, rest = [], [], list(values)
        needs = list(ctx.needs_input_grad[6:])
        for side, positions, has_bias in where:
            writes.append(Write(weight, 0 if side == "output" else 1, positions, rest.pop(0)))
            trains = needs.pop(0)
            if has_bias:
                writes.append(Write(bias, 0, positions, rest.pop(0)))
                trains |= needs.pop(0)
            if not trains:
                kept.append(None)
            else:
                kept.append(x if side == "output" else x.index_select(-1, positions))
        # The weight and the deltas, too: autograd refuses to go on when one of them was changed since.
        ctx.save_for_backward(weight, *kept, *values)
        with held.hold(writes):
            return compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Gradients for x and for the deltas that train, `None` for all else."""
        weight, *saved = ctx.saved_tensors
        kept, values = saved[: len(ctx.where)], saved[len(ctx.where) :]
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        writes: list[Write] = []
        grads: list[torch.Tensor | None] = []
        for (side, positions, has_bias), inputs in zip(ctx.where, kept, strict=True):
            writes.append(Write(weight, 0 if side == "output" else 1, positions, values[len(grads)]))
            if inputs is None:
                grads += [None] * (1 + has_bias)
                continue
            inputs = inputs.reshape(-1, inputs.shape[-1])
            if side == "input":
                grads.append(inputs.T @ rows)
                continue
            selected = rows.index_select(-1, positions)  # (tokens, m)
            grads += [selected.T @ inputs, selected.sum(0)] if has_bias else [selected.T @ inputs]
        grads = [found if found is None else found.to(own.dtype) for found, own in zip(grads, values, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[5]:
            with ctx.held.hold(writes):
                grad_x = grad @ weight
        return None, None, None, None, None, grad_x, *grads
