"""A saved adapter as the exports read it: its configuration, its base model, where its deltas are."""

import os
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig
from transformers import AutoModelForCausalLM

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, WeightSlice
from ..tuner import NeuronTunerConfig


PREFIX = "base_model.model."  # of the names of PEFT's tensors


def read_adapter_config(directory: str | os.PathLike) -> PeftConfig:
    """The configuration of a saved adapter of any PEFT method.

    Raises:
        FNSFTError: there is none in the directory, or it does not name its base model.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        raise FNSFTError(f"{directory} holds no adapter_config.json: not a directory of a saved adapter")
    config = PeftConfig.from_pretrained(str(directory))
    if not config.base_model_name_or_path:
        raise FNSFTError(f"{directory}/adapter_config.json does not name its base model (base_model_name_or_path)")
    return config


def read_delta_config(directory: str | os.PathLike) -> NeuronTunerConfig:
    """The configuration of a saved adapter of neuron deltas.

    Raises:
        FNSFTError: the directory holds none, or an adapter of another kind.
    """
    config = read_adapter_config(directory)
    if not isinstance(config, NeuronTunerConfig):
        raise FNSFTError(f"{directory} holds an adapter of type {config.peft_type}; one of neuron deltas was expected")
    return config


def load_model(name: str | os.PathLike, *, dtype: str = "auto", **loading):
    """Load a causal language model.

    Args:
        name: directory or Hub id.
        dtype: `"auto"` is that of its checkpoint.
        loading: further arguments of `from_pretrained`.

    Raises:
        FNSFTError: it cannot be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **loading)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FNSFTError(f"the model {str(name)!r} cannot be loaded ({reason})") from error


def delta_key(part: WeightSlice) -> str:
    """The name under which a saved adapter keeps the delta of a parameter."""
    return f"{PREFIX}{part.module_name}.neuron_delta_{part.parameter}"


def delta_mask(config: NeuronTunerConfig, sites: Sequence[NeuronSite]) -> NeuronMask:
    """The neurons that a configuration names, over all layers of the model whose sites these are."""
    return NeuronMask.from_ranges(config.neurons, {site.layer: site.width for site in sites}, config.site)
