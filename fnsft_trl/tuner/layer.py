"""One linear layer with a delta for some of its neurons."""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..errors import FNSFTError
from ..neurons import WeightSlice, linear_shape


class NeuronDeltaLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose selected neurons carry a delta.

    With W the base weight of shape (out, in), S the selected positions and D the delta:

        neurons are outputs:  y = W x + b;  y[S] += D x + d     D: (positions, in), d: (positions,)
        neurons are inputs:   y = W x + b + D^T x[S]            D: (positions, out)

    Deltas are stored one row for each position, start at zero, and are the only trained parameters.
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
        self._unmerged: dict[str, dict[str, torch.Tensor]] = {}
        self.merged_adapters = []

    def update_layer(
        self, adapter_name: str, slices: list[WeightSlice], neurons: torch.Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            slices: the parts of this layer's parameters that belong to neurons.
            neurons: numbers of the selected neurons, shape (m,).
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

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.neuron_delta_weight:
                continue
            delta, positions = self.neuron_delta_weight[name], self.positions[name]
            if self.slices[name]["weight"].side == "output":
                bias = self.neuron_delta_bias.get(name, None)
                change = nn.functional.linear(self._cast_input_dtype(x, delta.dtype), delta, bias)  # (..., positions)
                result = result.index_add(-1, positions, change.to(result.dtype))
            else:
                change = self._cast_input_dtype(x.index_select(-1, positions), delta.dtype) @ delta  # (..., out)
                result = result + change.to(result.dtype)
        return result

    def _deltas(self, adapter_name: str):
        """(parameter name, dimension, delta in the parameter's own orientation) of each changed parameter."""
        for parameter, part in self.slices[adapter_name].items():
            deltas = self.neuron_delta_weight if parameter == "weight" else self.neuron_delta_bias
            delta = deltas[adapter_name]
            yield parameter, part.dim, delta.T if parameter == "weight" and part.dim == 1 else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base weights, touching no other entry.

        Args:
            safe_merge: check that the result is finite before it is written.
            adapter_names: the adapters; all active ones by default.

        Raises:
            FNSFTError: the base is quantised, so that no single weight can be changed.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.neuron_delta_weight:
                continue
            base = self.get_base_layer()
            if not base.weight.is_floating_point():
                raise FNSFTError(
                    f"neuron deltas cannot be merged into a {type(base).__name__}: a quantised weight shares its "
                    "scale with its neighbours; load the base model unquantised, then merge"
                )
            originals, merged = {}, {}
            for parameter, dim, delta in self._deltas(name):
                values = getattr(base, parameter).data
                positions = self.positions[name]
                originals[parameter] = values.index_select(dim, positions)
                merged[parameter] = originals[parameter] + delta.detach().to(values.dtype)
                if safe_merge and not torch.isfinite(merged[parameter]).all():
                    raise ValueError(f"the merged weights hold NaN or infinity; adapter {name} seems to be broken")
            for parameter, dim, _ in self._deltas(name):
                getattr(base, parameter).data.index_copy_(dim, self.positions[name], merged[parameter])
            self._unmerged[name] = originals
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for parameter, dim, _ in self._deltas(name):
                values = self._unmerged[name][parameter]
                getattr(self.get_base_layer(), parameter).data.index_copy_(dim, self.positions[name], values)
            del self._unmerged[name]

    def __repr__(self) -> str:
        return "neuron_delta." + super().__repr__()
