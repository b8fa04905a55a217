"""Neuron deltas: a PEFT method that trains a small set of neurons and nothing else.

Importing this package adds the method to PEFT's tables, so that `get_peft_model`, `PeftModel.from_pretrained` and all
that builds on them know it. In a new process, import `fnsft_trl.tuner` (or any of this package's trainers) before
loading such an adapter.
"""

from ..compat.peft import add_method
from .config import NeuronPeftType, NeuronTunerConfig
from .experts import ExpertDeltaLayer
from .layer import NeuronDeltaLayer
from .linear import LinearDeltaLayer
from .model import NeuronTunerModel


add_method(NeuronPeftType.NEURON_DELTA, NeuronTunerConfig, NeuronTunerModel, ending=".values")

__all__ = ["ExpertDeltaLayer", "LinearDeltaLayer", "NeuronDeltaLayer", "NeuronTunerConfig", "NeuronTunerModel"]
