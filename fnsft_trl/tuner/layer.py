"""NeuronDeltaLayer: what layers with deltas of any kind have in common, and what PEFT asks of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat.deepspeed import is_partitioned
from ..compat.peft import BaseTunerLayer, BufferDict, check_adapters_to_merge
from ..compat.torch import is_fsdp_managed
from ..compat.transformers import is_deepspeed_zero3_enabled
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice
from .held import HeldWeights
from .hooks import has_foreign_forward
from .merged import Delta, Deltas, MergedWeights


_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DeltaValues(nn.Module):
    """The rows of one delta. A module of its own, so that the adapter's name stands inside the parameter's name, as it
    does with LoRA: trainers that copy an adapter look for it there.

    Attributes:
        values (`nn.Parameter`): one row for each position, shape (m, ...).
    """

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        """A copy of the values: under ZeRO-3 they are there for the length of this call alone."""
        return self.values.clone()


class NeuronDeltaLayer(nn.Module, BaseTunerLayer):
    """A layer whose selected neurons carry a delta; each kind of layer is a subclass.

    Deltas are stored one row for each position, start at zero, and are the only trained parameters. A subclass names
    in `adapter_layer_names` and `other_param_names` a `neuron_delta_NAME` and a `positions_NAME` for every parameter
    that may have a delta.

    The same function is computed in one of two forms. In the *additive* form the base layer computes as it is, with
    the hooks that it has, and the change is added to its output. In the *held* form the selected slices of the base
    weight are overwritten with base + delta for the length of one product ([`HeldWeights`]), which costs less. It is
    that of training where products have all bits of their factors, on plain layers that nobody else touches.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.held = HeldWeights(base_layer)
        self.merging = MergedWeights(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({}))
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
            getattr(self, f"neuron_delta_{slice_.parameter}")[adapter_name] = DeltaValues(values)
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

    def _active_deltas(self) -> Deltas:
        """The deltas that a forward pass computes with; none when they are switched off, or merged.

        Raises:
            FNSFTError: the base layer has a forward of its own.
        """
        self.release()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged or self.disable_adapters:
            return {}
        names = [name for name in self.active_adapters if name in self.slices]
        deltas = self._deltas(names, called=is_deepspeed_zero3_enabled())
        if deltas and has_foreign_forward(self.base_layer):
            raise FNSFTError(
                f"a {type(self.base_layer).__name__} with neuron deltas has a forward that was set on it alone, and "
                "what that makes of a changed weight is unknown; put what it does into hooks, or merge the deltas"
            )
        return deltas

    def _can_hold(self, deltas: Deltas, x: torch.Tensor) -> bool:
        """Whether the held form gives, for an input, what the additive form does."""
        names = [delta.slice_.parameter for of_adapter in deltas.values() for delta in of_adapter]
        return self.training and self.held.can_hold(names, x)

    def _deltas(self, names: Iterable[str], *, called: bool = False) -> Deltas:
        """The deltas of adapters; of each, in the order of the slices it was made with.

        Args:
            names: of the adapters.
            called: whether their values are what [`DeltaValues`] gives when it is called, and not its parameter.
        """

        def delta(name: str, parameter: str, slice_: WeightSlice) -> Delta:
            held = getattr(self, f"neuron_delta_{parameter}")[name]
            return Delta(slice_, getattr(self, f"positions_{parameter}")[name], held() if called else held.values)

        return {
            name: [delta(name, parameter, slice_) for parameter, slice_ in self.slices[name].items()] for name in names
        }

    def release(self) -> None:
        """Finish what an interruption (Ctrl-C, no memory left) broke off: without it, nothing is to be done."""
        self.held.release()
        if self.merging.is_torn:
            self.merging.merge(self._deltas(self.merged_adapters))

    def state_dict(self, *args, **kwargs):
        """As the parent's: base values and deltas apart."""
        self.release()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        self.release()
        return super().__getstate__()

    def _replicate_for_data_parallel(self):
        raise FNSFTError(
            "neuron deltas do not run under DataParallel, whose copies have no parameters of their own; start one "
            "process for each device (accelerate launch, torchrun), or show this one a single device"
        )

    def _apply(self, fn, recurse: bool = True):
        self.release()
        self.merging.move(fn, lambda: super(NeuronDeltaLayer, self)._apply(fn, recurse))
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
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
        self.release()
        self._check_merge(names)
        self.merging.merge(self._deltas([*self.merged_adapters, *names]))
        if safe_merge and not self.merging.is_finite():
            self.merging.merge(self._deltas(self.merged_adapters))
            raise ValueError(f"the merged weights have NaN or infinity; adapter {', '.join(names)} seems to be broken")
        self.merged_adapters.extend(names)

    def _check_merge(self, names: list[str]) -> None:
        base = self.get_base_layer()
        weights = [getattr(base, parameter) for name in names for parameter in self.slices[name]]
        if not all(weight.dtype in _MERGEABLE for weight in weights):
            raise FNSFTError(
                f"neuron deltas cannot be merged into a {type(base).__name__}: a quantised weight shares its "
                "scale with its neighbours; load the base model unquantised, then merge"
            )
        if is_fsdp_managed(base) or any(isinstance(weight, DTensor) or is_partitioned(weight) for weight in weights):
            raise FNSFTError("neuron deltas cannot be merged into sharded weights; merge in one process")
        if any(type(weight) is not nn.Parameter for weight in weights):
            raise FNSFTError(
                f"neuron deltas cannot be merged into a {type(base).__name__} whose weight is computed from other "
                "tensors (pruned, parametrized); make that permanent first (prune.remove, remove_parametrizations)"
            )

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit.

        Raises:
            FNSFTError: they were changed since, and what others have written would be lost.
        """
        self.merging.merge({})
        self.merged_adapters = []

    def __repr__(self) -> str:
        return "neuron_delta." + super().__repr__()
