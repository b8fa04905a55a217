"""What is needed of accelerate beyond its public interface. Seen in accelerate 1.15.0."""

# Reads a variable of the environment as accelerate does: ACCELERATE_USE_CPU keeps its processes off an accelerator.
# https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/environment.py
from accelerate.utils.environment import parse_flag_from_env
from torch import nn


__all__ = ["moves_inputs", "parse_flag_from_env"]


def moves_inputs(module: nn.Module) -> bool:
    """Whether the forward that was set on a module is accelerate's, which moves inputs and weights between devices and
    calls the module's own.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/hooks.py
    """
    return "_hf_hook" in vars(module)
