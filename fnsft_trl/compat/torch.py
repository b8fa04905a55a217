"""What is needed of torch beyond its public interface. Seen in torch 2.13.0."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Which part of a sharded tensor (`DTensor`) this process holds: neurons are counted over the whole weight.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/_utils.py
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules import module as modules


__all__ = [
    "compute_local_shape_and_global_offset",
    "exact",
    "forward_hooks",
    "full_products",
    "guard_hooks",
    "has_hooks",
    "is_fsdp_managed",
    "is_transformed",
    "multiplies_exactly",
    "remove_forward_hooks",
    "version_counter",
]

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


def guard_hooks() -> None:
    """Let compiled code notice hooks: those put on, or taken away, after the compilation, and those of another model.

    By default torch.compile takes for granted that hooks stay as they were. It runs what it made of one model for
    another of the same classes, whose hooks are then ignored without a word. Code that was compiled so is dropped, and
    made anew in its next call.
    https://docs.pytorch.org/docs/stable/torch.compiler_nn_module.html
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/config.py
    """
    from torch import _dynamo

    if _dynamo.config.skip_nnmodule_hook_guards:
        _dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


# A hook is public only to who registered it. Of a copy of a module nobody did, and it carries copies of the hooks.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The hooks that a module calls before and after its forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def remove_forward_hooks(module: nn.Module, kind: type) -> None:
    """Take those hooks away from a module that are of a class, whoever registered them."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[number]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs hooks, of its own or of all modules, beside its forward.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py
    """
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(own) or any(
        (
            modules._global_forward_pre_hooks,
            modules._global_forward_hooks,
            modules._global_backward_pre_hooks,
            modules._global_backward_hooks,
        )
    )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp) is computing: it follows no writes to weights.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/pyfunctorch.py
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def multiplies_exactly(x: Tensor) -> bool:
    """Whether matrix products of a tensor take all bits of their factors: in half precision, under autocast, and where
    float32 is rounded to TF32 or bfloat16 within a product, they do not.

    How the last is asked changed with torch 2.9, which refuses the old question once the new one was used.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/backends/__init__.py
    """
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        return False
    if x.dtype is torch.float64:
        return True
    backend = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    return precision not in ("tf32", "bf16")


@contextmanager
def full_products() -> Iterator[None]:
    """Have products of float32 matrices take all bits of their factors in a block, and no gradients recorded.

    Where they are rounded to TF32 or bfloat16, a weight would be changed by that rounding and not by what was asked.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/backends/__init__.py
    """
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in backends if getattr(backend, "fp32_precision", None) is not None]
    before = [backend.fp32_precision for backend in backends]
    precision = None if backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            yield
    finally:
        for backend, kept in zip(backends, before, strict=True):
            backend.fp32_precision = kept
        if precision is not None:
            torch.set_float32_matmul_precision(precision)


def exact(values: Tensor) -> Tensor:
    """Values in float64, on their device; on the CPU where the device knows no float64, as Apple's.

    https://docs.pytorch.org/docs/stable/mps_environment_variables.html
    """
    return (values.cpu() if values.device.type == "mps" else values).double()


def version_counter(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as autograd counts it; -1 for one of inference mode, not counted.

    A delta that was written to since it was added to the base weight is added anew.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py
    """
    return -1 if tensor.is_inference() else tensor._version
