"""What leaves training: a merged checkpoint or a plain LoRA, and which neurons differ between two sets of weights."""

from .difference import changed_neurons, verify_merge
from .merged import to_merged
from .plain_lora import to_plain_lora


__all__ = ["changed_neurons", "to_merged", "to_plain_lora", "verify_merge"]
