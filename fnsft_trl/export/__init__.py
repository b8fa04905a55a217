"""What leaves training: a merged, baked or smaller checkpoint, a plain LoRA or a GGUF file, and what differs in it."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "changed_neurons": "difference",
        "to_baked": "baked",
        "to_merged": "merged",
        "to_plain_lora": "plain_lora",
        "to_smaller": "smaller",
        "verify_export": "verification",
        "verify_merge": "difference",
    },
)
