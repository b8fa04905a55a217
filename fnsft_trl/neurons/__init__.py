"""Neurons: where they are in a model, which weights are theirs, and sets of them."""

from .experts import Experts
from .layout import NeuronLayout, WeightSlice
from .mask import NeuronMask, fitting_sites
from .sites import NeuronSite, base_model, find_neuron_sites


__all__ = [
    "Experts",
    "NeuronLayout",
    "NeuronMask",
    "NeuronSite",
    "WeightSlice",
    "base_model",
    "find_neuron_sites",
    "fitting_sites",
]
