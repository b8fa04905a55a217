"""What is needed of bitsandbytes beyond its public interface. Seen in bitsandbytes 0.50.2.

It is an optional dependency: nothing is imported here until it is asked for. Free of torch.
"""

from typing import Any


__all__ = [
    "CAST_LOGGER",
    "KERNEL_LOGGER",
    "MOMENTUM",
    "is_packed",
    "keep_unpacked",
    "keeps_only_squares",
    "packs_weights",
    "supported_devices",
    "zero_entry",
]

# Says at every start that there is a faster kernel.
# https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cpu/ops.py
KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"

# Says in every call of an 8-bit layer that it casts the input.
# https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/autograd/_functions.py
CAST_LOGGER = "bitsandbytes.autograd._functions"

# The name under which its optimizers keep the running mean of gradients, or the only running mean that they have; in 8
# bits, as indices into a table.
# https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py
MOMENTUM = "state1"


def keeps_only_squares(optimizer: Any) -> bool:
    """Whether the one running mean that an optimizer keeps is of squared gradients; False for one of another library.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py
    """
    return vars(optimizer).get("optimizer_name") in ("rmsprop", "adagrad")


def zero_entry(state: dict[str, Any]) -> int:
    """The entry of the table of an optimizer's 8-bit momentum that stands for zero.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py
    """
    return int(state["qmap1"].abs().argmin())


def supported_devices() -> set[str]:
    """Types of the devices that can hold weights in 4 and 8 bits.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/__init__.py
    """
    from bitsandbytes import supported_torch_devices

    return supported_torch_devices


# On a CPU with AVX512-BF16, `Linear4bit` packs its weights anew in the first forward pass without gradients, does not
# undo it in training, and lets no gradient through a packed layer.
# https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py


def packs_weights(module: Any) -> bool:
    """Whether a module is a 4-bit layer that may pack its weights for inference on a CPU."""
    return "support_avx512bf16_for_cpu" in vars(module)


def is_packed(module: Any) -> bool:
    """Whether a layer that [`packs_weights`] has done so."""
    state = module.weight.quant_state
    return state is not None and bool(vars(state).get("packing_format_for_cpu"))


def keep_unpacked(module: Any) -> None:
    """Keep a layer that [`packs_weights`] from doing so."""
    module.support_avx512bf16_for_cpu = False
