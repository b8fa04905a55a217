"""The routed experts of one layer, with a delta for some of their neurons."""

from __future__ import annotations

from functools import partial
from itertools import repeat

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat.transformers import is_deepspeed_zero3_enabled
from ..errors import FNSFTError
from ..neurons.experts import expert_by_expert, expert_weight, project_expert
from ..neurons.layout import WeightSlice
from .changes import Change, held_linear, summed_linear
from .hooks import call_with
from .layer import NeuronDeltaLayer
from .merged import Delta, Deltas


_PARAMETERS = tuple(f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias"))


class ExpertDeltaLayer(NeuronDeltaLayer):
    """A module with the experts of a layer, whose selected neurons carry a delta.

    Every expert computes what [`LinearDeltaLayer`] says of linear layers, in the same two forms. There is one delta
    for each weight of all experts, with one row for each position:

        gate_up_proj (or up_proj): (positions, hidden), its bias: (positions,)      down_proj: (positions, hidden)

    At `mlp_output` a position is a channel of every expert, and its row holds the rows of all of them, one after the
    other: down_proj: (positions, experts * units), its bias: (positions, experts).

    As long as deltas are active the experts are computed one after the other; without them, and with merged ones, the
    module's own implementation runs.
    """

    adapter_layer_names = tuple(f"neuron_delta_{parameter}" for parameter in _PARAMETERS)
    other_param_names = tuple(f"positions_{parameter}" for parameter in _PARAMETERS)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._counts: dict[str, list[int]] = {}  # adapter name -> how many selected neurons each expert has

    def update_layer(
        self, adapter_name: str, slices: list[WeightSlice], neurons: torch.Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter, as the parent's.

        Raises:
            FNSFTError: the weights are sharded by ZeRO-3.
        """
        if is_deepspeed_zero3_enabled():
            raise FNSFTError(
                f"neuron deltas of experts ({slices[0].module_name}) do not run under ZeRO-3, which gathers weights "
                "for whole modules only; use ZeRO-2, or select neurons of layers without experts"
            )
        for slice_ in slices:
            if 0 in slice_.dims:
                by_expert = (slice_.among(neurons) - slice_.first) // slice_.units
                self._counts[adapter_name] = by_expert.bincount(minlength=self._n_experts).tolist()
        super().update_layer(adapter_name, slices, neurons, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._counts.pop(adapter_name, None)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        deltas = self._active_deltas()
        inputs = (hidden_states, chosen, weights)
        if not deltas:
            return self.base_layer(*inputs)
        weight = self.base_layer.down_proj
        if isinstance(weight, DTensor) or (weight.is_meta and not hidden_states.is_meta):
            raise FNSFTError(
                "the experts' weights are sharded on their own, or offloaded, and neuron deltas read them one expert "
                "at a time; shard whole blocks (FSDP's transformer-based wrapping), or keep experts on one device"
            )
        return call_with(self.base_layer, partial(self._by_expert, deltas), *inputs)

    def _by_expert(self, deltas: Deltas, *inputs: torch.Tensor) -> torch.Tensor:
        """The experts one after the other.

        Args:
            deltas: the deltas.
            inputs: those of `forward`.
        """
        changes, base = self._changes(deltas), self.base_layer
        is_held = self._can_hold(deltas, inputs[0])
        reached: set[int] = set()  # experts that have tokens

        def project(parameter: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            reached.add(expert)
            mine = changes[parameter][expert] if parameter in changes else []
            compute = partial(project_expert, base, parameter, expert)
            if not mine:
                return compute(x)
            weight = expert_weight(base, parameter, expert)
            bias = getattr(base, f"{parameter}_bias")[expert] if base.has_bias else None
            if is_held:
                return held_linear(x, mine, held=self.held, compute=compute, weight=weight, bias=bias)
            return summed_linear(x, mine, weight=weight, bias=bias)

        output = expert_by_expert(base, *inputs, project)
        for name, of_adapter in deltas.items():
            counts = self._counts.get(name)
            if counts is not None and not any(counts[expert] for expert in reached):
                # No token came to its neurons. Without gradients at all, DDP would wait for them.
                for delta in of_adapter:
                    output = output + 0 * delta.values.sum().to(output.dtype)
        return output

    @property
    def _n_experts(self) -> int:
        return len(self.base_layer.down_proj)

    def _row_shape(self, slice_: WeightSlice) -> tuple[int, ...]:
        weight = getattr(self.base_layer, slice_.parameter)
        rest = [size for dim, size in enumerate(weight.shape) if dim not in slice_.dims]
        return (torch.Size(rest).numel(),) if rest else ()

    def _changes(self, deltas: Deltas) -> dict[str, list[list[Change]]]:
        """Weight -> for each expert, the changes of its projection, one for each adapter that has neurons there."""
        changes: dict[str, list[list[Change]]] = {}
        for name, of_adapter in deltas.items():
            by_parameter = {delta.slice_.parameter: delta for delta in of_adapter}
            for parameter, delta in by_parameter.items():
                if parameter.endswith("_bias"):
                    continue
                bias = by_parameter.get(f"{parameter}_bias")
                positions = self._positions_by_expert(name, delta)
                rows = self._split(name, delta.slice_, delta.values, (-1,))
                biases = repeat(None) if bias is None else self._split(name, bias.slice_, bias.values, ())
                by_expert = changes.setdefault(parameter, [[] for _ in range(self._n_experts)])
                for found, *change in zip(by_expert, positions, rows, biases, strict=False):
                    if len(change[0]):
                        found.append(Change(delta.slice_.side, *change))
        return changes

    def _split(self, name: str, slice_: WeightSlice, rows: torch.Tensor, rest: tuple[int, ...]) -> list[torch.Tensor]:
        """The rows of each expert, (positions of the expert, *rest); their gradients come together in one piece."""
        if 0 not in slice_.dims:  # every expert has all positions
            return list(rows.view(len(rows), self._n_experts, *rest).unbind(1))
        by_offset = rows.view(len(slice_.offsets), -1, *rows.shape[1:])
        return [chunk.flatten(0, 1) for chunk in by_offset.split(self._counts[name], 1)]

    def _positions_by_expert(self, name: str, delta: Delta) -> list[torch.Tensor]:
        """The positions of each expert's neurons within its own matrix, (m,)."""
        slice_, positions = delta.slice_, delta.positions
        if 0 not in slice_.dims:
            return [positions] * self._n_experts
        return self._split(name, slice_, positions % (slice_.units * len(slice_.offsets)), ())

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return base_layer.down_proj.device, base_layer.down_proj.dtype

    def __getattr__(self, name: str):
        """The experts' weights by their names, without the deltas of adapters that are not merged."""
        if name not in _PARAMETERS:
            return super().__getattr__(name)
        self.release()
        return getattr(self.base_layer, name)
