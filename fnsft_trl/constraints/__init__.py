"""LoRA and full fine-tuning held to a NeuronMask, exactly: every neuron outside it stays bit-identical."""

from .frozen import FrozenSlices, zero_frozen_gradients
from .full import check_optimizer_name, constrain_full, freeze_neurons
from .lora import constrain_lora, factor_slices, reached_neurons
from .lora_config import check_lora_config, set_lora_targets
from .momentum import check_momenta, plain_optimizer
from .neurons import frozen_by_site, trainable_neurons


__all__ = [
    "FrozenSlices",
    "check_lora_config",
    "check_momenta",
    "check_optimizer_name",
    "constrain_full",
    "constrain_lora",
    "factor_slices",
    "frozen_by_site",
    "freeze_neurons",
    "plain_optimizer",
    "reached_neurons",
    "set_lora_targets",
    "trainable_neurons",
    "zero_frozen_gradients",
]
