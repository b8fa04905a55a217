"""Adapters of neuron deltas as the exports read them: where their deltas are, and where nothing may be written."""

import os
from collections.abc import Sequence
from pathlib import Path

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


def check_target(output_dir: str | os.PathLike, adapter: SavedAdapter, *, beside: str) -> None:
    """Check, before anything is written, that an export does not take the place of what it is made from.

    Args:
        output_dir: where it is to be written.
        adapter: what is exported.
        beside: name of a file beside which the export would be taken for something else.

    Raises:
        FNSFTError: it is the directory of the adapter or of its base model, or holds that file.
    """
    target = Path(output_dir).expanduser().resolve()
    for what, source in (
        ("the adapter", adapter.directory),
        ("its base model", adapter.config.base_model_name_or_path),
    ):
        if target == Path(source).expanduser().resolve():
            raise FNSFTError(f"{output_dir} is the directory of {what}, which the export would destroy; name another")
    if (target / beside).is_file():
        raise FNSFTError(f"{output_dir} holds {beside}, beside which the export would not be loaded; name another")


def delta_key(part: WeightSlice) -> str:
    """The name under which a saved adapter keeps the delta of a parameter."""
    return f"{PREFIX}{part.module_name}.neuron_delta_{part.parameter}"


def delta_mask(config: NeuronTunerConfig, sites: Sequence[NeuronSite]) -> NeuronMask:
    """The neurons that a configuration names, over all layers of the model whose sites these are."""
    return NeuronMask.from_ranges(config.neurons, {site.layer: site.width for site in sites}, config.site)
