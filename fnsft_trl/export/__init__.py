"""What leaves training: a merged checkpoint, a plain LoRA or a GGUF file, and which neurons differ."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "changed_neurons": "difference",
        "verify_merge": "difference",
        "to_merged": "merged",
        "to_plain_lora": "plain_lora",
    },
)
