"""What is needed of DeepSpeed beyond its public interface. Seen in deepspeed 0.19.8, which need not be installed."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor


__all__ = ["gathered", "is_partitioned", "own_part"]


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has taken a parameter apart: it has no entries, but for the length of a call of its module.

    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/partition_parameters.py
    """
    return "ds_id" in vars(tensor)


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A block in which parameters that ZeRO-3 has taken apart are whole, to be read; all processes enter it."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that ZeRO-3 has taken apart, flat, without what fills up the last part:
    that memory holds anything.

    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/partition_parameters.py
    """
    part = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - parameter.ds_zero_partition_rank * part.numel())]
