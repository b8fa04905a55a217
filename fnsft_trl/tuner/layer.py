"""One linear layer with a delta for some of its neurons."""

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
from ..neurons import WeightSlice, linear_shape


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
        self.in_features, self.out_features = linear_shape(base_layer)
        self.neuron_delta_weight = nn.ParameterDict({})
        self.neuron_delta_bias = nn.ParameterDict({})
        self.positions = BufferDict({}, persistent=False)
        self.slices: dict[str, dict[str, WeightSlice]] = {}
        self.merged_adapters = []
        # What the base parameters hold at present: the deltas of these adapters, in this state, ...
        self._held: tuple[str, ...] = ()
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self._is_stale = False
        # ... at these positions, which had these values: parameter name -> (positions, ...).
        self._held_positions: torch.Tensor | None = None
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
        other = self.in_features if parts["weight"].side == "output" else self.out_features
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
        where = torch.searchsorted(self.positions[to], self.positions[source])
        targets = dict(self._deltas(to))
        for parameter, delta in self._deltas(source):
            targets[parameter].index_add_(0, where, delta.to(targets[parameter].dtype), alpha=weight)

    def float_deltas(self) -> None:
        """On a quantised base, bring all deltas back to float32 after a trainer has cast them to half precision.

        Deltas are small beside the weights they change: half precision would round most of their steps away.
        """
        if self.get_base_layer().weight.is_floating_point():
            return
        for deltas in (self.neuron_delta_weight, self.neuron_delta_bias):
            for delta in deltas.values():
                if delta.dtype in (torch.bfloat16, torch.float16):
                    delta.data = delta.data.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self.base_layer(x)
        names = () if self.disable_adapters else tuple(n for n in self.active_adapters if n in self.slices)
        if not self._can_hold():
            if self._held:
                self.hold(())
            return self._add(self.base_layer(x), x, names)
        # A fused or 8-bit optimizer changes the deltas without leaving a trace in their version counters, so in
        # training, and after every backward pass, the slices are written anew.
        self.hold(names, refresh=self.training or self._is_stale)
        if not torch.is_grad_enabled():
            return self.base_layer(x)
        return _HeldLinear.apply(self, names, x, *(delta for name in names for _, delta in self._deltas(name)))

    def _can_hold(self) -> bool:
        """Whether the selected slices of the base weight can be overwritten, and the plain layer then called."""
        if torch.compiler.is_compiling() or is_deepspeed_zero3_enabled():
            return False
        if type(self.base_layer) not in (nn.Linear, Conv1D):  # a subclass may be quantised or compute something else
            return False
        weight = self.base_layer.weight
        return (
            type(weight) is nn.Parameter  # not a DTensor
            and not self._is_sharded()
            and not weight.requires_grad
            and not weight.is_inference()
            and weight.device.type != "meta"  # offloaded
        )

    def _is_sharded(self) -> bool:
        """Whether FSDP manages the weights: they look plain in a forward pass, but are gathered copies."""
        return getattr(self, "_is_fsdp_managed_module", False)

    def _add(self, result: torch.Tensor, x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """The additive form: `result`, shape (..., out), changed by the deltas."""
        for name in names:
            delta, positions = self.neuron_delta_weight[name], self.positions[name]
            if self.slices[name]["weight"].side == "output":
                bias = self.neuron_delta_bias.get(name, None)
                change = nn.functional.linear(self._cast_input_dtype(x, delta.dtype), delta, bias)  # (..., positions)
                result = result.index_add(-1, positions, change.to(result.dtype))
            else:
                change = self._cast_input_dtype(x.index_select(-1, positions), delta.dtype) @ delta  # (..., out)
                result = result + change.to(result.dtype)
        return result

    def _deltas(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(parameter name, delta) of each changed parameter: the weight, then the bias."""
        for parameter in self.slices[adapter_name]:
            deltas = self.neuron_delta_weight if parameter == "weight" else self.neuron_delta_bias
            yield parameter, deltas[adapter_name]

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
        if names != self._held:
            for parameter, rows in self._originals.items():
                self._put(parameter, rows)
            self._held_positions, self._originals = None, {}
            if names:
                positions = [self.positions[name] for name in names]
                self._held_positions = positions[0] if len(names) == 1 else torch.cat(positions).unique()
                parameters = dict.fromkeys(parameter for name in names for parameter in self.slices[name])
                self._originals = {parameter: self._take(parameter) for parameter in parameters}
        for parameter, rows in self._originals.items():
            self._put(parameter, self._sum(parameter, rows, names))
        self._held, self._seen, self._is_stale = names, seen, False

    def _sum(self, parameter: str, rows: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """Base values plus deltas, at the higher of their precisions, shape (held positions, ...)."""
        for name in names:
            delta = dict(self._deltas(name)).get(parameter)
            if delta is None:
                continue
            if len(names) == 1:
                return rows + delta
            rows = rows.to(torch.promote_types(rows.dtype, delta.dtype))
            where = torch.searchsorted(self._held_positions, self.positions[name])
            rows = rows.index_add(0, where, delta.to(rows.dtype))
        return rows

    def _dim(self, parameter: str) -> int:
        return next(iter(self.slices.values()))[parameter].dim

    def _take(self, parameter: str) -> torch.Tensor:
        """The entries of a base parameter at the held positions, one row for each."""
        values, dim = getattr(self.get_base_layer(), parameter), self._dim(parameter)
        rows = values.index_select(dim, self._held_positions)
        return rows.T.contiguous() if dim == 1 else rows

    def _put(self, parameter: str, rows: torch.Tensor) -> None:
        """The inverse of `_take`."""
        values, dim = getattr(self.get_base_layer(), parameter), self._dim(parameter)
        rows = rows.to(values.dtype)
        if dim == 0:
            values.index_copy_(0, self._held_positions, rows)
            return
        # Copying columns from a transposed view takes many times as long as transposing first, in blocks that stay in
        # the processor's cache.
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            values[block].index_copy_(1, self._held_positions, rows[:, block].T.contiguous())

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

    def _apply(self, fn, recurse: bool = True):
        self.release()
        super()._apply(fn, recurse)
        if self._originals:
            self._held_positions = fn(self._held_positions)
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
        if not base.weight.is_floating_point():
            raise FNSFTError(
                f"neuron deltas cannot be merged into a {type(base).__name__}: a quantised weight shares its "
                "scale with its neighbours; load the base model unquantised, then merge"
            )
        if type(base.weight) is not nn.Parameter or self._is_sharded():
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


class _HeldLinear(torch.autograd.Function):
    """The base layer with deltas held in its weight; gradients for the input and the deltas, and nothing else.

    With G the gradient of y, shape (tokens, out):

        x: G W      D: G[:, S]^T x (neurons are outputs), x[:, S]^T G (inputs)      d: the sum of G[:, S] over tokens

    So the backward pass keeps x once for all layers that read it (outputs), or x[:, S] alone (inputs).
    """

    @staticmethod
    def forward(ctx, layer: NeuronDeltaLayer, names: tuple[str, ...], x: torch.Tensor, *deltas: torch.Tensor):
        ctx.layer, ctx.names = layer, names
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
        # Another forward pass may have switched adapters off since (the reference model of a preference loss).
        layer.hold(ctx.names)
        layer._is_stale = True
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
            if layer.slices[name]["weight"].side == "output":
                selected = grad.index_select(-1, layer.positions[name])  # (tokens, positions)
                by_parameter = {"weight": selected.T @ kept}
                if "bias" in layer.slices[name]:
                    by_parameter["bias"] = selected.sum(0)
            else:
                by_parameter = {"weight": kept.T @ grad}
            grads += [by_parameter[parameter].to(delta.dtype) for parameter, delta in layer._deltas(name)]
        return None, None, grad_x, *grads
