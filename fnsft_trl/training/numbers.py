"""Which numbers of training arguments have a meaning. TRL finds others out late, or never. Free of torch."""

import math
from numbers import Integral, Real
from typing import Any

from ..errors import FNSFTError
from ..fields import LARGEST_SEED


# Argument -> the values that have a meaning, from and to.
TRAINING_RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, None)),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "pad_to_multiple_of"), (1, None)),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm"), (0, None)),
    **dict.fromkeys(("warmup_steps", "dataloader_num_workers", "logging_steps", "save_steps"), (0, None)),
    **dict.fromkeys(("neftune_noise_alpha", "adam_epsilon"), (0, None)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 0.999999)),
    **dict.fromkeys(("seed", "data_seed"), (0, LARGEST_SEED)),
    "label_smoothing_factor": (0, 1),
    "max_steps": (-1, None),
}
_OPTIONAL = ("max_length", "pad_to_multiple_of", "neftune_noise_alpha", "data_seed")  # None is a value of these


def range_text(lowest: float, highest: float | None) -> str:
    """A range in words, as it follows `it must be`."""
    return f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"


def check_numbers(args: Any) -> None:
    """Check the numbers of training arguments.

    Raises:
        FNSFTError: one of them has no meaning.
    """
    for name, (lowest, highest) in TRAINING_RANGES.items():
        value = vars(args).get(name)
        if name not in vars(args) or (value is None and name in _OPTIONAL):
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not lowest <= value <= (math.inf if highest is None else highest):
            raise FNSFTError(f"{name} is {value!r}; it must be a number {range_text(lowest, highest)}")


def check_lora_numbers(config: Any) -> None:
    """Check the numbers of a LoraConfig that is given for training.

    Raises:
        FNSFTError: with one of them there is no adapter, or one that does not train.
    """
    wrong = {
        "r": not isinstance(config.r, Integral) or config.r < 1,
        "lora_alpha": not isinstance(config.lora_alpha, Real) or not 0 < config.lora_alpha < math.inf,
        "lora_dropout": not isinstance(config.lora_dropout, Real) or not 0 <= config.lora_dropout < 1,
        "inference_mode": config.inference_mode,
    }
    needed = {
        "r": "a whole number above 0",
        "lora_alpha": "a number above 0",
        "lora_dropout": "at least 0 and below 1",
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise FNSFTError(
            f"{name} of the LoraConfig is {getattr(config, name)!r}, with which nothing trains; it must be "
            f"{needed.get(name, False)}"
        )
