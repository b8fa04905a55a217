"""FrozenSlices: parts of parameters that an optimizer may not change."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import FNSFTError
from ..neurons.layout import WeightSlice, mask_positions, select_positions, write_positions


# Names of the optimizer state that moves a weight even where its gradient is zero; state1 is bitsandbytes' name.
_MOMENTA = ("exp_avg", "momentum_buffer", "grad_avg", "state1")


class FrozenSlices:
    """Slices of parameters that stay bit-identical. Made by [`constrain_full`] and [`constrain_lora`].

    Attributes:
        slices (`list`): (parameter, shape to view it in or `None`, dimensions, frozen positions along them, their
            values) of every partly frozen parameter. Of a sharded parameter (`DTensor`), positions and values are
            those of this process's shard.
    """

    def __init__(self) -> None:
        self.slices: list[
            tuple[nn.Parameter, tuple[int, ...] | None, tuple[int, ...], torch.Tensor, torch.Tensor]
        ] = []
        self._hooks = []

    def freeze_neurons(
        self, parameter: nn.Parameter, part: WeightSlice, neurons: torch.Tensor, *, for_a_while: bool = False
    ) -> None:
        """Freeze those of a site's neurons that have a part in one parameter.

        Args:
            parameter: the parameter. With all of its neurons frozen it no longer requires a gradient.
            part: which of its entries belong to which neuron.
            neurons: numbers of the neurons, shape (m,).
            for_a_while: whether they are to be released again.
        """
        count = len(part.among(neurons))
        if count == part.count and not for_a_while:
            parameter.requires_grad_(False)
        elif count:
            self.freeze(parameter, part.dims, part.indices(neurons))

    def freeze(
        self,
        parameter: nn.Parameter,
        dims: tuple[int, ...],
        positions: torch.Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        zero_gradients: bool = True,
    ) -> torch.Tensor:
        """Note the values of some positions, to be put back, and zero their gradients as they are accumulated.

        Args:
            parameter: the parameter.
            dims: the dimensions that count positions.
            positions: the positions along them, shape (m,).
            shape: view the parameter in this shape.
            zero_gradients: `False` where something else keeps the gradients at zero.

        Returns:
            The mask of the positions within this process's shard, of a shape that broadcasts to it.
        """
        positions = _local_positions(parameter, dims, positions.to(parameter.device))
        local = _local(parameter.detach(), shape)
        self.slices.append((parameter, shape, dims, positions, select_positions(local, dims, positions)))
        mask = mask_positions(local, dims, positions)
        if zero_gradients:

            def zero_gradient(parameter: nn.Parameter) -> None:
                _local(parameter.grad, shape).masked_fill_(mask, 0)

            requires_grad = parameter.requires_grad
            parameter.requires_grad_(True)  # without, as in an adapter that is not active yet, there can be no hook
            self._hooks.append(parameter.register_post_accumulate_grad_hook(zero_gradient))
            parameter.requires_grad_(requires_grad)
        return mask

    @property
    def masks_gradients(self) -> bool:
        """Whether frozen positions depend on gradients that are zeroed as they are accumulated."""
        return bool(self._hooks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the frozen values after every step of this optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.restore())

    @torch.no_grad()
    def restore(self) -> None:
        """Write the noted values of the frozen positions."""
        for parameter, shape, dims, positions, values in self.slices:
            write_positions(_local(parameter, shape), dims, positions, values)

    def release(self) -> None:
        """Let all positions train again."""
        for hook in self._hooks:
            hook.remove()
        self.slices, self._hooks = [], []

    @torch.no_grad()
    def clear_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the momentum of the frozen positions.

        Running means of squared gradients stay: without them the first steps after a release would be many times
        too large.
        """
        for parameter, shape, dims, positions, _ in self.slices:
            mask = mask_positions(_local(parameter, shape), dims, positions)
            if shape is not None:
                mask = mask.expand(shape).reshape(parameter.shape)
            state = optimizer.state.get(parameter, {})
            for name in state.keys() & set(_MOMENTA):
                momentum = _local(state[name])  # AdEMAMix stacks two of the parameter's shape
                # Momentum in 8 bits holds indices into a table of values.
                zero = int(state["qmap1"].abs().argmin()) if momentum.dtype == torch.uint8 else 0
                momentum.masked_fill_(mask, zero)


def _local(tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor if shape is None else tensor.view(shape)


def _local_positions(parameter: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """The positions that lie in this process's shard, counted within it."""
    if not isinstance(parameter, DTensor):
        return positions
    if len(dims) > 1:
        raise FNSFTError(
            "expert weights that are sharded (FSDP) cannot be held to neurons yet; use plain data parallelism"
        )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = positions - offset[dims[0]]
    return local[(local >= 0) & (local < shape[dims[0]])]
