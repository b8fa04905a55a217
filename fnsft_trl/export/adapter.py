"""Adapters of neuron deltas as the exports read them: where their deltas are, and where nothing may be written."""

import os
from collections.abc import Sequence

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, WeightSlice
from ..tuner import NeuronTunerConfig
from ..tuner.saved import PREFIX, SavedAdapter


def read_deltas(directory: str | os.PathLike) -> SavedAdapter:
    """A saved adapter of neuron deltas.

    Raises:
        FNSFTError: the directory holds none, or an adapter of another kind.
    """
    adapter = SavedAdapter.read(directory)
    if not isinstance(adapter.config, NeuronTunerConfig):
        raise FNSFTError(
            f"{directory} holds an adapter of type {adapter.config.peft_type}; one of neuron deltas was expected"
        )
    return adapter


def sources_of(adapter: SavedAdapter) -> dict[str, str | os.PathLike]:
    """What an export reads, in words -> its place."""
    return {"the adapter": adapter.directory, "its base model": adapter.config.base_model_name_or_path}


def delta_key(part: WeightSlice) -> str:
    """The name under which a saved adapter keeps the delta of a parameter."""
    return f"{PREFIX}{part.module_name}.neuron_delta_{part.parameter}"


def delta_mask(config: NeuronTunerConfig, sites: Sequence[NeuronSite]) -> NeuronMask:
    """The neurons that a configuration names, over all layers of the model whose sites these are."""
    return NeuronMask.from_ranges(config.neurons, {site.layer: site.width for site in sites}, config.site)
