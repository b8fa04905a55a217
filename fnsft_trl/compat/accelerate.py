"""What is needed of accelerate beyond its public interface. Seen in accelerate 1.15.0."""

# Reads a variable of the environment as accelerate does: ACCELERATE_USE_CPU keeps its processes off an accelerator.
# https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/environment.py
from accelerate.utils.environment import parse_flag_from_env


__all__ = ["parse_flag_from_env"]
