"""NeuronDeltaLayer: what layers with deltas of any kind have in common, and what PEFT asks of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..compat.peft import BaseTunerLayer, BufferDict, check_adapters_to_merge
from ..compat.transformers import is_deepspeed_zero3_enabled
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice
from .held import Delta, Deltas, HeldWeights


class NeuronDeltaLayer(nn.Module, BaseTunerLayer):
    """A layer whose selected neurons carry a delta; each kind of layer is a subclass.

    Deltas are stored one row for each position, start at zero, and are the only trained parameters. A subclass names
    in `adapter_layer_names` and `other_param_names` a `neuron_delta_NAME` and a `positions_NAME` for every parameter
    that may have a delta.

    The same function is computed in one of two forms. In the *held* form the selected slices of the base weight are
    overwritten with base + delta, and the backward pass computes the gradient of these slices alone. [`HeldWeights`]
    keeps the base values aside, and they are put back bit for bit whenever anyone looks: on disabling, switching,
    unmerging, in `state_dict` and in `layer.weight`. In the *additive* form the weight is not touched and the change
    is added to the output. It costs more, and serves where the weight cannot be written: quantised, sharded or
    offloaded weights, and under `torch.compile`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.held = HeldWeights(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in self.other_param_names:
            setattr(self, name, BufferDict({}, persistent=False))
        # adapter name -> parameter name -> where its neurons are
        self.slices: dict[str, dict[str, WeightSlice]] = {}
        self.merged_adapters = []

    def update_layer(
        self, adapter_name: str, slices: list[WeightSlice], neurons: torch.Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            slices: the slices of this layer's parameters that belong to neurons.
            neurons: numbers of the selected neurons, ascending, shape (m,).
            inference_mode: whether its deltas stay frozen.
        """
        self.slices[adapter_name] = {slice_.parameter: slice_ for slice_ in slices}
        for slice_ in slices:
            positions = slice_.indices(neurons)
            values = torch.zeros(len(positions), *self._row_shape(slice_))
            getattr(self, f"positions_{slice_.parameter}")[adapter_name] = positions
            getattr(self, f"neuron_delta_{slice_.parameter}")[adapter_name] = nn.Parameter(values)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _row_shape(self, slice_: WeightSlice) -> tuple[int, ...]:
        """Shape of a delta's row for one position: flat, or `()` where a position is a single number."""
        raise NotImplementedError

    @torch.no_grad()
    def add_scaled(self, source: str, weight: float, *, to: str) -> None:
        """Add an adapter's deltas, times a weight, to those of another one that has all its neurons.

        Args:
            source: name of the adapter.
            weight: the factor.
            to: name of the adapter that is changed.
        """
        deltas = self._deltas([source, to])
        for delta, target in zip(deltas[source], deltas[to], strict=True):
            order = target.positions.argsort()
            where = order[torch.searchsorted(target.positions, delta.positions, sorter=order)]
            values = target.values  # new deltas have the precision of the base
            values.data = values.data.to(torch.promote_types(values.dtype, delta.values.dtype))
            values.index_add_(0, where, delta.values.to(values.dtype), alpha=weight)

    def float_deltas(self) -> None:
        """Bring all deltas back to float32 after a trainer has cast those of a quantised model to half precision.

        Deltas are small beside the weights they change: half precision would round most of their steps away.
        """
        for of_adapter in self._deltas(self.slices).values():
            for delta in of_adapter:
                if delta.values.dtype in (torch.bfloat16, torch.float16):
                    delta.values.data = delta.values.data.float()

    def _prepare(self) -> tuple[Deltas, bool]:
        """The deltas that a forward pass computes with, and whether the base weights are to hold them."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            self.release()  # a backward pass of an earlier graph has held what it needed
            return {}, False
        names = () if self.disable_adapters else (name for name in self.active_adapters if name in self.slices)
        can_hold = self._can_hold()
        if not can_hold:
            self.held.release()
        return self._deltas(names), can_hold

    def _can_hold(self) -> bool:
        """Whether the selected slices of the base weights can be overwritten, and the plain layer then called."""
        return not torch.compiler.is_compiling() and not is_deepspeed_zero3_enabled() and self.held.can_hold

    def _deltas(self, names: Iterable[str]) -> Deltas:
        """The deltas of adapters; of each, in the order of the slices it was made with."""
        return {
            name: [
                Delta(
                    slice_,
                    getattr(self, f"positions_{parameter}")[name],
                    getattr(self, f"neuron_delta_{parameter}")[name],
                )
                for parameter, slice_ in self.slices[name].items()
            ]
            for name in names
        }

    def release(self) -> None:
        """Put the base values back until the next forward pass; what is merged stays merged."""
        self.held.release(self._deltas(self.merged_adapters))

    def state_dict(self, *args, **kwargs):
        """As the parent's: base values and deltas apart."""
        self.release()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True):
        """As the parent's; the next forward pass reads all deltas anew."""
        # An average of weights that takes their place for an evaluation may leave no trace in their version counters.
        self.held.expire()
        return super().train(mode)

    def _replicate_for_data_parallel(self):
        raise FNSFTError(
            "neuron deltas do not run under DataParallel, whose copies have no parameters of their own; start one "
            "process for each device (accelerate launch, torchrun), or show this one a single device"
        )

    def _apply(self, fn, recurse: bool = True):
        self.release()
        super()._apply(fn, recurse)
        self.held.move(fn)
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
        if any(type(weight) is not nn.Parameter for weight in weights) or self.held.is_sharded:
            raise FNSFTError("neuron deltas cannot be merged into sharded weights; merge in one process")
        with self.held.hold(self._deltas([*self.merged_adapters, *names]), refresh=True):
            is_broken = safe_merge and not self.held.is_finite()
        if is_broken:
            self.release()
            raise ValueError(f"the merged weights have NaN or infinity; adapter {', '.join(names)} seems to be broken")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        self.merged_adapters = []
        self.release()

    def __repr__(self) -> str:
        return "neuron_delta." + super().__repr__()
