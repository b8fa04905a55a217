"""What is needed of torch beyond its public interface. Seen in torch 2.13.0."""

import inspect
import logging
from functools import cache

import torch.distributed as dist
from torch import Tensor, nn

# Which part of a sharded tensor (`DTensor`) this process holds: neurons are counted over the whole weight.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/_utils.py
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


__all__ = ["compute_local_shape_and_global_offset", "is_fsdp_managed", "version_counter"]

logger = logging.getLogger(__name__)

# FSDP1 and FSDP2 set it on every module whose parameters they shard, for torch.compile to see.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fully_shard.py
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_dynamo_utils.py
_FSDP_MARK = "_is_fsdp_managed_module"


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether FSDP shards a module's parameters: in a forward pass they look plain, but are gathered copies.

    The modules that `fully_shard` is called on have a public type, those below them have nothing but a private mark.
    Where torch sets that no more, every module counts as sharded as soon as processes work together: what is written
    into a gathered copy is lost without an error.
    """
    if getattr(module, _FSDP_MARK, False):
        return True
    return dist.is_available() and dist.is_initialized() and not _fsdp_marks_modules()


@cache
def _fsdp_marks_modules() -> bool:
    """Whether the code of FSDP still sets the mark."""
    try:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.fsdp._dynamo_utils import _annotate_modules_for_dynamo
    except ImportError:
        found = False
    else:
        codes = (inspect.unwrap(function).__code__ for function in (fully_shard, _annotate_modules_for_dynamo))
        found = all(_FSDP_MARK in code.co_names for code in codes)
    if not found:
        logger.warning(
            "this version of torch does not say which modules FSDP shards, so all weights count as sharded in a run "
            "of several processes: neuron deltas are slower there, and cannot be merged; use an older torch"
        )
    return found


def version_counter(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as autograd counts it; -1 for one of inference mode, not counted.

    A delta that was written to since it was added to the base weight is added anew.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py
    """
    return -1 if tensor.is_inference() else tensor._version
