"""What is needed of accelerate beyond its public interface. Seen in accelerate 1.15.0."""

import torch

# Reads a variable of the environment as accelerate does: ACCELERATE_USE_CPU keeps its processes off an accelerator.
# https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/environment.py
from accelerate.utils.environment import parse_flag_from_env
from torch import nn


__all__ = ["input_device", "moves_inputs", "parse_flag_from_env"]


def moves_inputs(module: nn.Module) -> bool:
    """Whether the forward that was set on a module is accelerate's, which moves inputs and weights between devices and
    calls the module's own.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/hooks.py
    """
    return "_hf_hook" in vars(module)


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model are put: on the device of its first weight that is on one.

    Weights that a device map offloads are on `meta` between two passes. Where all are, accelerate brings inputs from
    the CPU to where it computes.

    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/hooks.py
    """
    return next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
