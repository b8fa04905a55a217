"""The routed experts of one layer, with a delta for some of their neurons."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import FNSFTError
from ..neurons.experts import expert_by_expert, expert_weight, project_expert
from ..neurons.sites import WeightSlice
from .layer import NeuronDeltaLayer, add_change, change_gradients


_PARAMETERS = tuple(f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias"))

# What one adapter changes in one projection of one expert: positions (m,), delta (m, other), bias (m,) or `None`.
_Change = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class ExpertDeltaLayer(NeuronDeltaLayer):
    """A module with the experts of a layer, whose selected neurons carry a delta.

    Every expert computes what [`NeuronDeltaLayer`] says of linear layers, in the same two forms. There is one delta
    for each weight of all experts, with one row for each position:

        gate_up_proj (or up_proj): (positions, hidden), its bias: (positions,)      down_proj: (positions, hidden)

    At `mlp_output` a position is a channel of every expert, and its row holds the rows of all of them, one after the
    other: down_proj: (positions, experts * units), its bias: (positions, experts).

    Whenever gradients are recorded, and in the additive form, the experts are computed one after the other. Otherwise
    the weights hold the deltas and the module's own implementation runs.
    """

    adapter_layer_names = tuple(f"neuron_delta_{parameter}" for parameter in _PARAMETERS)
    other_param_names = tuple(f"positions_{parameter}" for parameter in _PARAMETERS)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._counts: dict[str, list[int]] = {}  # adapter name -> how many selected neurons each expert has

    def update_layer(
        self, adapter_name: str, slices: list[WeightSlice], neurons: torch.Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            slices: the parts of the experts' parameters that belong to neurons.
            neurons: numbers of the selected neurons, ascending, shape (m,).
            inference_mode: whether its deltas stay frozen.

        Raises:
            FNSFTError: the weights are sharded by ZeRO-3.
        """
        if is_deepspeed_zero3_enabled():
            raise FNSFTError(
                f"neuron deltas of experts ({slices[0].module_name}) do not run under ZeRO-3, which gathers weights "
                "for whole modules only; use ZeRO-2, or select neurons of layers without experts"
            )
        self.slices[adapter_name] = {part.parameter: part for part in slices}
        experts = len(self.base_layer.down_proj)
        for part in slices:
            weight = getattr(self.base_layer, part.parameter)
            positions = part.indices(neurons)
            rest = [size for dim, size in enumerate(weight.shape) if dim not in part.dims]
            shape = (len(positions), torch.Size(rest).numel()) if rest else (len(positions),)
            getattr(self, f"positions_{part.parameter}")[adapter_name] = positions
            getattr(self, f"neuron_delta_{part.parameter}")[adapter_name] = nn.Parameter(torch.zeros(shape))
            if 0 in part.dims:
                by_expert = (part.among(neurons) - part.first) // part.units
                self._counts[adapter_name] = by_expert.bincount(minlength=experts).tolist()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def positions_of(self, adapter_name: str, parameter: str) -> torch.Tensor:
        """Positions of an adapter's neurons in a parameter, in the order of the rows of their delta."""
        return getattr(self, f"positions_{parameter}")[adapter_name]

    def float_deltas(self) -> None:
        """Bring all deltas back to float32: experts stay in half precision where the rest is quantised."""
        for name in self.slices:
            for _, delta in self._deltas(name):
                if delta.dtype in (torch.bfloat16, torch.float16):
                    delta.data = delta.data.float()

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            self.release()
        names = () if self.merged else self._names()
        is_held = not self.merged and self._can_hold()
        if is_held:
            self.hold(names, refresh=self.training or self._is_stale)
        elif self._held and not self.merged:
            self.hold(())
        if not names or (is_held and not torch.is_grad_enabled()):
            return self.base_layer(hidden_states, chosen, weights)
        if not is_held:
            self._check_weights_are_here(hidden_states)

        parameters = dict.fromkeys(parameter for name in names for parameter in self.slices[name])
        weights_of = [parameter for parameter in parameters if not parameter.endswith("_bias")]
        changes = {parameter: self._changes(names, parameter) for parameter in weights_of}
        sides = {parameter: self._part(parameter).side for parameter in weights_of}
        reached: set[int] = set()  # experts that have tokens

        def project(parameter: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            mine: list[_Change] = changes[parameter][expert] if parameter in changes else []
            reached.add(expert)
            if is_held:
                trained = [change for change in mine if change[1].requires_grad]
                deltas = [tensor for change in trained for tensor in change[1:] if tensor is not None]
                where = [(positions, bias is not None) for positions, _, bias in trained]
                side = sides.get(parameter, "")
                return _HeldExpert.apply(self, names, parameter, expert, side, where, x, *deltas)
            result = project_expert(self.base_layer, parameter, expert, x)
            for positions, delta, bias in mine:
                result = add_change(result, x, sides[parameter], positions, delta, bias)
            return result

        output = expert_by_expert(self.base_layer, hidden_states, chosen, weights, project)
        for name in names:
            counts = self._counts.get(name)
            if counts is not None and not any(counts[expert] for expert in reached):
                # No token came to its neurons. Without gradients at all, DDP would wait for them.
                for _, delta in self._deltas(name):
                    output = output + 0 * delta.sum().to(output.dtype)
        return output

    def _is_plain(self) -> bool:
        return True  # or it would not be one of `Experts`

    def _check_weights_are_here(self, x: torch.Tensor) -> None:
        weight = self.base_layer.down_proj
        if isinstance(weight, DTensor) or (weight.is_meta and not x.is_meta):
            raise FNSFTError(
                "the experts' weights are sharded on their own, or offloaded, and neuron deltas read them one expert "
                "at a time; shard whole blocks (FSDP's transformer-based wrapping), or keep experts on one device"
            )

    def _part(self, parameter: str) -> WeightSlice:
        return next(parts[parameter] for parts in self.slices.values() if parameter in parts)

    def _changes(self, names: tuple[str, ...], parameter: str) -> list[list[_Change]]:
        """The changes of each expert's projection, one for each adapter that has neurons there."""
        changes: list[list[_Change]] = [[] for _ in self.base_layer.down_proj]
        for name in names:
            if parameter not in self.slices[name]:
                continue
            deltas = dict(self._deltas(name))
            bias = deltas.get(f"{parameter}_bias")
            rows = self._split(name, parameter, deltas[parameter], (-1,))
            biases = repeat(None) if bias is None else self._split(name, f"{parameter}_bias", bias, ())
            parts = zip(self._positions_by_expert(name, parameter), rows, biases, strict=False)
            for expert, (positions, delta, expert_bias) in enumerate(parts):
                if len(positions):
                    changes[expert].append((positions, delta, expert_bias))
        return changes

    def _split(self, name: str, parameter: str, rows: torch.Tensor, rest: tuple[int, ...]) -> list[torch.Tensor]:
        """The rows of each expert, (positions of the expert, *rest); their gradients come together in one piece."""
        part = self.slices[name][parameter]
        if 0 not in part.dims:  # every expert has all positions
            return list(rows.view(len(rows), len(self.base_layer.down_proj), *rest).unbind(1))
        by_offset = rows.view(len(part.offsets), -1, *rows.shape[1:])
        return [chunk.flatten(0, 1) for chunk in by_offset.split(self._counts[name], 1)]

    def _positions_by_expert(self, name: str, parameter: str) -> list[torch.Tensor]:
        """The positions of each expert's neurons within its own matrix, (m,)."""
        part, positions = self.slices[name][parameter], self.positions_of(name, parameter)
        if 0 not in part.dims:
            return [positions] * len(self.base_layer.down_proj)
        return self._split(name, parameter, positions % (part.units * len(part.offsets)), ())

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return base_layer.down_proj.device, base_layer.down_proj.dtype

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._counts.pop(adapter_name, None)

    def __getattr__(self, name: str):
        """The experts' weights by their names, without the deltas of adapters that are not merged."""
        if name not in _PARAMETERS:
            return super().__getattr__(name)
        self.release()
        return getattr(self.base_layer, name)


class _HeldExpert(torch.autograd.Function):
    """One projection of one expert, with deltas held in its weight; see `_HeldLinear`.

    It serves for experts without a delta, too: a plain linear function would find that their weights, which share
    their tensor with those of others, were written to since its forward pass.
    """

    @staticmethod
    def forward(
        ctx,
        layer: ExpertDeltaLayer,
        names: tuple[str, ...],
        parameter: str,
        expert: int,
        side: str,
        where: list[tuple[torch.Tensor, bool]],
        x: torch.Tensor,
        *deltas: torch.Tensor,
    ):
        ctx.layer, ctx.names, ctx.seen, ctx.parameter, ctx.expert = layer, names, layer._seen, parameter, expert
        ctx.side, ctx.where = side, where
        ctx.dtypes = [delta.dtype for delta in deltas]
        ctx.save_for_backward(*(x if side == "output" else x.index_select(-1, positions) for positions, _ in where))
        return project_expert(layer.base_layer, parameter, expert, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Gradients for x and for the deltas that train, `None` for all else."""
        layer: ExpertDeltaLayer = ctx.layer
        layer.hold_again(ctx.names, ctx.seen)
        grad_x = None
        if ctx.needs_input_grad[6]:
            grad_x = grad @ expert_weight(layer.base_layer, ctx.parameter, ctx.expert).to(grad.dtype)
        grads: list[torch.Tensor] = []
        for (positions, has_bias), kept in zip(ctx.where, ctx.saved_tensors, strict=True):
            grads += change_gradients(ctx.side, positions, kept.to(grad.dtype), grad, has_bias)
        grads = [found.to(dtype) for found, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, None, None, None, None, None, grad_x, *grads
