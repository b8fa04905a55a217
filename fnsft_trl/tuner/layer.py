"""One linear layer with a delta for some of its neurons; and what layers with deltas of any kind have in common."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from ..errors import FNSFTError
from ..neurons.layout import select_positions, write_positions
from ..neurons.sites import WeightSlice, linear_shape


_BLOCK = 512  # rows of a weight of which columns are written at once


class NeuronDeltaLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose selected neurons carry a delta.

    With W the base weight of shape (out, in), S the selected positions and D the delta:

        neurons are outputs:  y = W x + b;  y[S] += D x + d     D: (positions, in), d: (positions,)
        neurons are inputs:   y = W x + b + D^T x[S]            D: (positions, out)

    Deltas are stored one row for each position, start at zero, and are the only trained parameters.

    The same function is computed in one of two forms. In the *held* form the selected slices of the base weight are
    overwritten with base + delta, and the backward pass computes the gradient of these slices alone; the base values
    are kept aside, and put back bit for bit whenever anyone looks: on disabling, switching, unmerging, in
    `state_dict` and in `layer.weight`. In the *additive* form the weight is not touched and the change is added to
    the output. It costs more, and serves where the weight cannot be written: quantised, sharded or offloaded weights,
    and under `torch.compile`.
    """

    adapter_layer_names = ("neuron_delta_weight", "neuron_delta_bias")
    other_param_names = ("positions",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in self.other_param_names:
            setattr(self, name, BufferDict({}, persistent=False))
        # adapter name -> parameter name -> where its neurons are
        self.slices: dict[str, dict[str, WeightSlice]] = {}
        self.merged_adapters = []
        # What the base parameters hold at present: the deltas of these adapters, in this state, ...
        self._held: tuple[str, ...] = ()
        self._seen: tuple[tuple[int, int, int], ...] | None = ()
        self._is_stale = False
        # ... at these positions, which had these values: parameter name -> (positions,) and (positions, ...).
        self._held_positions: dict[str, torch.Tensor] = {}
        self._originals: dict[str, torch.Tensor] = {}

    def update_layer(
        self, adapter_name: str, slices: list[WeightSlice], neurons: torch.Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            slices: the parts of this layer's parameters that belong to neurons.
            neurons: numbers of the selected neurons, ascending, shape (m,).
            inference_mode: whether its deltas stay frozen.
        """
        parts = {part.parameter: part for part in slices}
        positions = parts["weight"].indices(neurons)
        self.slices[adapter_name] = parts
        self.positions[adapter_name] = positions
        n_in, n_out = linear_shape(self.base_layer)
        other = n_in if parts["weight"].side == "output" else n_out
        self.neuron_delta_weight[adapter_name] = nn.Parameter(torch.zeros(len(positions), other))
        if "bias" in parts:
            self.neuron_delta_bias[adapter_name] = nn.Parameter(torch.zeros(len(positions)))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def add_scaled(self, source: str, weight: float, *, to: str) -> None:
        """Add an adapter's deltas, times a weight, to those of another one that has all its neurons.

        Args:
            source: name of the adapter.
            weight: the factor.
            to: name of the adapter that is changed.
        """
        targets = dict(self._deltas(to))
        for parameter, delta in self._deltas(source):
            order = self.positions_of(to, parameter).argsort()
            there = self.positions_of(source, parameter)
            where = order[torch.searchsorted(self.positions_of(to, parameter), there, sorter=order)]
            target = targets[parameter]  # new deltas have the precision of the base
            target.data = target.data.to(torch.promote_types(target.dtype, delta.dtype))
            target.index_add_(0, where, delta.to(target.dtype), alpha=weight)

    def positions_of(self, adapter_name: str, parameter: str) -> torch.Tensor:
        """Positions of an adapter's neurons in a parameter, in the order of the rows of their delta."""
        return self.positions[adapter_name]

    def float_deltas(self) -> None:
        """On a quantised base, bring all deltas back to float32 after a trainer has cast them to half precision.

        Deltas are small beside the weights they change: half precision would round most of their steps away.
        """
        if self.get_base_layer().weight.is_floating_point():
            return
        for name in self.slices:
            for _, delta in self._deltas(name):
                if delta.dtype in (torch.bfloat16, torch.float16):
                    delta.data = delta.data.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            self.release()  # a backward pass of an earlier graph has held what it needed
            return self.base_layer(x)
        names = self._names()
        if not self._can_hold():
            if self._held:
                self.hold(())
            return self._add(self.base_layer(x), x, names)
        # A fused or 8-bit optimizer, or an average of weights put in their place, changes the deltas without leaving a
        # trace in their version counters, so the slices are written anew in training, after every backward pass, and
        # after every `train()` or `eval()`.
        self.hold(names, refresh=self.training or self._is_stale)
        if not torch.is_grad_enabled():
            return self.base_layer(x)
        return _HeldLinear.apply(self, names, x, *(delta for name in names for _, delta in self._deltas(name)))

    def _names(self) -> tuple[str, ...]:
        """The adapters that change this layer at present."""
        return () if self.disable_adapters else tuple(name for name in self.active_adapters if name in self.slices)

    def _is_plain(self) -> bool:
        """Whether the base layer computes by its parameters and nothing else."""
        return type(self.base_layer) in (nn.Linear, Conv1D)  # a subclass may be quantised or compute something else

    def _can_hold(self) -> bool:
        """Whether the selected slices of the base weights can be overwritten, and the plain layer then called."""
        if torch.compiler.is_compiling() or is_deepspeed_zero3_enabled() or not self._is_plain():
            return False
        return not self._is_sharded() and all(
            type(weight) is nn.Parameter  # not a DTensor
            and not weight.requires_grad
            and not weight.is_inference()
            and weight.device.type != "meta"  # offloaded
            for weight in self.base_layer._parameters.values()
            if weight is not None
        )

    def _is_sharded(self) -> bool:
        """Whether FSDP manages the weights: they look plain in a forward pass, but are gathered copies."""
        return getattr(self, "_is_fsdp_managed_module", False)

    def _add(self, result: torch.Tensor, x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """The additive form: `result`, shape (..., out), changed by the deltas."""
        for name in names:
            bias = self.neuron_delta_bias.get(name, None)
            side = self.slices[name]["weight"].side
            result = add_change(result, x, side, self.positions[name], self.neuron_delta_weight[name], bias)
        return result

    def _deltas(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(parameter name, delta) of each changed parameter: the weight, then the bias."""
        for parameter in self.slices[adapter_name]:
            yield parameter, getattr(self, f"neuron_delta_{parameter}")[adapter_name]

    @torch.compiler.disable
    @torch.no_grad()
    def hold(self, names: tuple[str, ...], *, refresh: bool = False) -> None:
        """Make the base parameters hold base + deltas.

        Args:
            names: the adapters whose deltas are added; with `()` the base values are put back, bit for bit.
            refresh: write even when nothing seems to have changed.

        Raises:
            FNSFTError: the weights were sharded while they held deltas.
        """
        deltas = [delta for name in names for _, delta in self._deltas(name)]
        seen = tuple((id(d), d.data_ptr(), -1 if d.is_inference() else d._version) for d in deltas)
        if names == self._held and seen == self._seen and not (refresh and names):
            return
        if self._is_sharded():
            raise FNSFTError(
                "the model was sharded while its weights held neuron deltas, so the base values cannot be put back; "
                "call model.base_model.release() before sharding it"
            )
        self._seen = None  # so that after an interruption (Ctrl-C, no memory left) all of this is done again
        if names != self._held:
            for parameter, rows in self._originals.items():
                self._put(parameter, rows)
            self._held, self._held_positions, self._originals = (), {}, {}
            for parameter in dict.fromkeys(parameter for name in names for parameter in self.slices[name]):
                positions = [self.positions_of(name, parameter) for name in names if parameter in self.slices[name]]
                self._held_positions[parameter] = positions[0] if len(names) == 1 else torch.cat(positions).unique()
                self._originals[parameter] = self._take(parameter)
            self._held = names  # from here on entries are overwritten
        for parameter, rows in self._originals.items():
            self._put(parameter, self._sum(parameter, rows, names))
        self._seen, self._is_stale = seen, False

    def hold_again(self, names: tuple[str, ...], seen: tuple | None) -> None:
        """Hold what a forward pass held, for its backward pass: others may have switched adapters since.

        Args:
            names: the adapters that it held.
            seen: the state of their deltas at the time.

        Raises:
            FNSFTError: the deltas have changed since, and the values that the gradient depends on are gone.
        """
        self.hold(names)
        if self._seen != seen:
            raise FNSFTError(
                "neuron deltas were changed between a forward pass and its backward pass, which needs their former "
                "values; call backward before the optimizer steps"
            )
        self._is_stale = True

    def _sum(self, parameter: str, rows: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """Base values plus deltas, at the higher of their precisions, shape (held positions, ...)."""
        for name in names:
            delta = dict(self._deltas(name)).get(parameter)
            if delta is None:
                continue
            if len(names) == 1:
                return rows + delta.view_as(rows)
            rows = rows.to(torch.promote_types(rows.dtype, delta.dtype))
            where = torch.searchsorted(self._held_positions[parameter], self.positions_of(name, parameter))
            rows = rows.index_add(0, where, delta.to(rows.dtype).view(-1, *rows.shape[1:]))
        return rows

    def _dims(self, parameter: str) -> tuple[int, ...]:
        return next(parts[parameter].dims for parts in self.slices.values() if parameter in parts)

    def _take(self, parameter: str) -> torch.Tensor:
        """The entries of a base parameter at the held positions, one row for each."""
        values = getattr(self.get_base_layer(), parameter)
        return select_positions(values, self._dims(parameter), self._held_positions[parameter]).contiguous()

    def _put(self, parameter: str, rows: torch.Tensor) -> None:
        """The inverse of `_take`."""
        values, dims = getattr(self.get_base_layer(), parameter), self._dims(parameter)
        positions, rows = self._held_positions[parameter], rows.to(values.dtype)
        if dims != (1,) or values.dim() != 2:
            write_positions(values, dims, positions, rows)
            return
        # Copying columns from a transposed view takes many times as long as transposing first, in blocks that stay in
        # the processor's cache.
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            values[block].index_copy_(1, positions, rows[:, block].T.contiguous())

    def release(self) -> None:
        """Put the base values back until the next forward pass; what is merged stays merged."""
        merged = tuple(self.merged_adapters)
        if self._held != merged:
            self.hold(merged)

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

    def state_dict(self, *args, **kwargs):
        """As the parent's: base values and deltas apart."""
        self.release()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True):
        """As the parent's; the next forward pass reads all deltas anew."""
        self._is_stale = True
        return super().train(mode)

    def _replicate_for_data_parallel(self):
        raise FNSFTError(
            "neuron deltas do not run under DataParallel, whose copies have no parameters of their own; start one "
            "process for each device (accelerate launch, torchrun), or show this one a single device"
        )

    def _apply(self, fn, recurse: bool = True):
        self.release()
        super()._apply(fn, recurse)
        if self._originals:
            self._held_positions = {parameter: fn(rows) for parameter, rows in self._held_positions.items()}
            self._originals = {parameter: fn(rows) for parameter, rows in self._originals.items()}
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off, the base weights are back at once unless adapters are merged."""
        super().enable_adapters(enabled)
        self.release()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters."""
        self.release()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        self.release()
        super().delete_adapter(adapter_name)
        self.slices.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base weights, touching no other entry.

        Args:
            safe_merge: check that the result is finite, and put the weights back if it is not.
            adapter_names: the adapters; all active ones by default.

        Raises:
            FNSFTError: the base is quantised or sharded, so that no single weight can be changed.
            ValueError: `safe_merge` found a value that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.slices]
        if not names:
            return
        base = self.get_base_layer()
        weights = [getattr(base, parameter) for name in names for parameter in self.slices[name]]
        if not all(weight.is_floating_point() for weight in weights):
            raise FNSFTError(
                f"neuron deltas cannot be merged into a {type(base).__name__}: a quantised weight shares its "
                "scale with its neighbours; load the base model unquantised, then merge"
            )
        if any(type(weight) is not nn.Parameter for weight in weights) or self._is_sharded():
            raise FNSFTError("neuron deltas cannot be merged into sharded weights; merge in one process")
        self.hold((*self.merged_adapters, *names), refresh=True)
        written = [self._take(parameter) for parameter in self._originals]
        if safe_merge and not all(torch.isfinite(rows).all() for rows in written):
            self.hold(tuple(self.merged_adapters))
            raise ValueError(f"the merged weights hold NaN or infinity; adapter {', '.join(names)} seems to be broken")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        self.merged_adapters = []
        self.release()

    def __repr__(self) -> str:
        return "neuron_delta." + super().__repr__()


def add_change(
    result: torch.Tensor,
    x: torch.Tensor,
    side: str,
    positions: torch.Tensor,
    delta: torch.Tensor,
    bias: torch.Tensor | None,
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
    def forward(ctx, layer: NeuronDeltaLayer, names: tuple[str, ...], x: torch.Tensor, *deltas: torch.Tensor):
        ctx.layer, ctx.names, ctx.seen = layer, names, layer._seen
        kept = []
        for name in names:
            if any(delta.requires_grad for _, delta in layer._deltas(name)):
                is_output = layer.slices[name]["weight"].side == "output"
                kept.append(x if is_output else x.index_select(-1, layer.positions[name]))
            else:
                kept.append(None)
        ctx.save_for_backward(*kept)
        return layer.base_layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Gradients for x and for the deltas that train, `None` for all else."""
        layer: NeuronDeltaLayer = ctx.layer
        layer.hold_again(ctx.names, ctx.seen)
        grad_x = None
        if ctx.needs_input_grad[2]:
            weight = layer.base_layer.weight.to(grad.dtype)
            grad_x = grad @ (weight.T if isinstance(layer.base_layer, Conv1D) else weight)
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grads: list[torch.Tensor | None] = []
        for name, kept in zip(ctx.names, ctx.saved_tensors, strict=True):
            if kept is None:
                grads += [None] * len(layer.slices[name])
                continue
            kept = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)
            side = layer.slices[name]["weight"].side
            found = change_gradients(side, layer.positions[name], kept, grad, "bias" in layer.slices[name])
            grads += [g.to(delta.dtype) for g, (_, delta) in zip(found, layer._deltas(name), strict=True)]
        return None, None, grad_x, *grads
