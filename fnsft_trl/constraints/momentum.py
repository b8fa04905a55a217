"""Momentum: the state of an optimizer that moves a weight even where its gradient is zero."""

from collections.abc import Iterator

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..compat.bitsandbytes import MOMENTUM, keeps_only_squares, zero_entry
from ..errors import FNSFTError


_MOMENTA = ("exp_avg", "momentum_buffer", "grad_avg", "prev", MOMENTUM)
# State of a parameter's size that is none: squares, by which steps are divided, sizes of steps, averages of weights,
# and what rounding has cut off weights. Without the squares, the first steps after a release would be far too large.
_OTHERS = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "variance", "state2"),
    *("exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"),
    *("step_size", "ax", "compensation", "kahan_comp"),
)


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrapper that accelerate puts around it."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_momenta(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    """Check that the momentum of a parameter is known, once the optimizer has stepped.

    Raises:
        FNSFTError: the optimizer keeps something as large as the parameter under a name that is not known, or momentum
            in which the parameter's entries have none of their own.
    """
    for _ in _momenta(optimizer, parameter):
        pass


def clear_momenta(optimizer: Optimizer, parameter: torch.Tensor, entries: torch.Tensor) -> None:
    """Zero the momentum of some entries of a parameter; running means of squared gradients stay.

    Args:
        optimizer: the optimizer, or accelerate's wrapper of it.
        parameter: the parameter.
        entries: `True` at these, of a shape that broadcasts to that of the parameter, or of its shard.

    Raises:
        FNSFTError: as [`check_momenta`].
    """
    for momentum, zero in list(_momenta(optimizer, parameter)):
        momentum.masked_fill_(entries, zero)


def _momenta(optimizer: Optimizer, parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """(momentum of a parameter, or of its shard; what stands for zero in it)."""
    optimizer = plain_optimizer(optimizer)
    state = optimizer.state.get(parameter, {})
    size, shape = _local(parameter).numel(), _local(parameter).shape
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1 or name in _OTHERS:
            continue
        value = _local(value)
        if name in _MOMENTA and value.shape[-len(shape) :] == shape:  # AdEMAMix stacks two
            if name == MOMENTUM and keeps_only_squares(optimizer):
                continue
            # Momentum in 8 bits holds indices into a table of values.
            yield value, zero_entry(state) if value.dtype == torch.uint8 else 0
        elif name in _MOMENTA or value.numel() >= size:
            raise FNSFTError(
                f"{type(optimizer).__name__} keeps {name!r}, of shape {tuple(value.shape)}, for a parameter of shape "
                f"{tuple(shape)}: it is not known how to clear the momentum of single neurons in it; use another "
                "optimizer, such as adamw_torch"
            )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
