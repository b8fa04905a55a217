"""Neuron deltas: a PEFT method that trains a small set of neurons and nothing else.

Importing this package adds the method to PEFT's tables, so that `get_peft_model`, `PeftModel.from_pretrained` and all
that builds on them know it. In a new process, import `fnsft_trl.tuner` (or any of this package's trainers) before
loading such an adapter.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import NeuronPeftType, NeuronTunerConfig
from .experts import ExpertDeltaLayer
from .layer import NeuronDeltaLayer
from .linear import LinearDeltaLayer
from .model import NeuronTunerModel


_TYPE = NeuronPeftType.NEURON_DELTA
# PEFT's own register function insists on an entry of its enum; the tables behind it take any key.
PEFT_TYPE_TO_CONFIG_MAPPING[_TYPE] = NeuronTunerConfig
PEFT_TYPE_TO_TUNER_MAPPING[_TYPE] = NeuronTunerModel
PEFT_TYPE_TO_PREFIX_MAPPING[_TYPE] = NeuronTunerModel.prefix

__all__ = ["ExpertDeltaLayer", "LinearDeltaLayer", "NeuronDeltaLayer", "NeuronTunerConfig", "NeuronTunerModel"]
