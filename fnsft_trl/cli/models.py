"""Loading a model by name, with errors that say what to do."""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from ..compat.peft import has_lora_targets
from ..data.embedded import resolve_model
from ..errors import FNSFTError, library_errors
from ..hub.files import explain
from ..neurons import find_neuron_sites
from ..tuner.saved import first_line
from .options.loading import LoadingConfig
from .precision import check_quantization


# Ways to spread a model over devices; other values of device_map are a device.
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def model_errors(name_or_path: str) -> AbstractContextManager[None]:
    """Say in one line that a model cannot be loaded, and what to give instead."""
    return library_errors(
        lambda error: (
            f"the model {name_or_path!r} cannot be loaded ({_reason(error, name_or_path)}); give a directory with a "
            "causal language model and its tokenizer, a Hub id, or `embedded`"
        )
    )


def _reason(error: Exception, name: str) -> str:
    """What the Hub says, where transformers passes it on: a gated model, no right to read it."""
    if os.path.isfile(os.path.join(name, ADAPTER_CONFIG_NAME)):
        return f"it is an adapter; merge it into its base first: fnsft export {name} --to merged --output_dir DIR"
    cause = error.__cause__
    known = (
        None
        if cause is None or isinstance(cause, (EntryNotFoundError, RevisionNotFoundError))
        else explain(cause, name)
    )
    return known or first_line(error)


def check_loading(loading: LoadingConfig, device: str, *, processes: int = 1) -> None:
    """Check, before anything is loaded, that this machine can load a model so.

    Args:
        loading: how.
        device: type of the device that is computed on.
        processes: how many of them load the model.

    Raises:
        FNSFTError: there is no such implementation of attention, no such device, or no quantised weights here; or
            several processes would each spread a model over all devices.
    """
    check_attention(loading.attn_implementation)
    _check_device_map(loading.device_map)
    if loading.device_map is not None and processes > 1:
        raise FNSFTError(
            f"device_map spreads a model over the devices of one process, and each of these {processes} processes "
            "holds its own model; start one process (without accelerate launch), or drop device_map"
        )
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(loading, option):
            check_quantization(option, device)


def loading_arguments(loading: LoadingConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that a LoadingConfig asks for, but for those of quantised weights."""
    given = {name: getattr(loading, name) for name in ("device_map", "attn_implementation")}
    given = {name: value for name, value in given.items() if value is not None}
    return {"dtype": loading.dtype, **given, **source_arguments(loading)}


def source_arguments(loading: LoadingConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that a tokenizer and a configuration take too."""
    found = {"revision": loading.model_revision} if loading.model_revision is not None else {}
    return found | {"trust_remote_code": loading.trust_remote_code}  # without, transformers asks at the terminal


def load_model(name_or_path: str, loading: LoadingConfig, *, device: torch.device | str | None = None):
    """Load a causal language model.

    Args:
        name_or_path: directory, Hub id, or `embedded`.
        loading: how; see [`check_loading`].
        device: where to put it without a `device_map`; the CPU by default, where quantised weights choose their own.

    Raises:
        FNSFTError: it is not found, is not a causal language model, or does not fit on the device.
    """
    arguments = loading_arguments(loading) | quantization_arguments(loading, device)
    with model_errors(name_or_path):
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name_or_path), **arguments)
    if loading.load_in_4bit:
        from ..training.preparation import keep_4bit_layers_differentiable

        keep_4bit_layers_differentiable(model)  # as in training; packed layers also refuse some widths
    if device is None or "device_map" in arguments:
        return model
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise FNSFTError(
            f"the model {name_or_path!r} does not fit on {device}; start one process, without accelerate launch, and "
            "spread it over all devices (device_map=auto), or load it in few bits (load_in_4bit)"
        ) from error


def load_model_and_tokenizer(name_or_path: str, loading: LoadingConfig, *, device: torch.device | str | None = None):
    """Load a causal language model, as [`load_model`] does, and its tokenizer."""
    path = resolve_model(name_or_path)
    with model_errors(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path, **source_arguments(loading))
    return load_model(name_or_path, loading, device=device), tokenizer


def quantization_arguments(loading: LoadingConfig, device: torch.device | str | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for weights in 4 or 8 bits, which go onto a device as they are loaded."""
    if not loading.is_quantized:
        return {}
    placed = {} if device is None or loading.device_map is not None else {"device_map": {"": device}}
    return {"quantization_config": _quantization(loading), **placed}


def _quantization(loading: LoadingConfig) -> BitsAndBytesConfig:
    """As TRL has it where `fnsft train` says no more."""
    if loading.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    settings = {} if loading.dtype == "auto" else {"bnb_4bit_compute_dtype": loading.dtype}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


def _check_device_map(device_map: str | None) -> None:
    if device_map is None or device_map in _SPREADING:
        return
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise FNSFTError(
            f"device_map is {device_map!r}; it must be a device such as cpu or cuda:0, or one of: "
            f"{', '.join(_SPREADING)}"
        ) from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here is not None and device.type == here.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        there = "no accelerator" if here is None else f"{torch.accelerator.device_count()} of type {here.type}"
        raise FNSFTError(f"device_map is {device_map!r}, and this machine has {there}; drop it, or give auto")


def check_attention(name: str | None) -> None:
    """Check that transformers knows an attention implementation; a kernel on the Hub (org/name) may be anything.

    Raises:
        FNSFTError: it does not.
    """
    known = ("eager", *sorted(AttentionInterface().valid_keys()))
    if name is not None and "/" not in name and name not in known:
        raise FNSFTError(f"attn_implementation is {name!r}; it must be one of: {', '.join(known)}")


def default_lora_targets(config: PretrainedConfig) -> list[str] | None:
    """The modules for LoRA to train when none are named: PEFT's own choice (`None`) where it has one.

    For architectures that PEFT's table lacks: the up, gate and down projections of the MLPs.

    Raises:
        FNSFTError: the model has no MLP that is understood either, or its MLPs are experts.
    """
    if has_lora_targets(config.model_type):
        return None
    with torch.device("meta"):  # only its structure is read
        model = AutoModelForCausalLM.from_config(config)
    sites = find_neuron_sites(model)
    if any(site.experts for site in sites):
        raise FNSFTError(
            f"PEFT has no LoRA targets for {config.model_type}, whose MLPs are experts; name them: "
            "lora_target_modules or lora_target_parameters"
        )
    return sorted(name for site in sites for name in site.layout.modules())
