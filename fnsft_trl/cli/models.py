"""Loading a model by name, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ADAPTER_CONFIG_NAME

from ..data.embedded import resolve_model
from ..errors import FNSFTError
from ..hub.files import explain
from ..neurons.sites import find_neuron_sites


@contextmanager
def model_errors(name_or_path: str) -> Iterator[None]:
    """Say in one line that a model cannot be loaded, and what to give instead."""
    try:
        yield
    except FNSFTError:
        raise
    except (OSError, ValueError) as error:
        raise FNSFTError(
            f"the model {name_or_path!r} cannot be loaded ({_reason(error, name_or_path)}); give a directory with a "
            "causal language model and its tokenizer, a Hub id, or `embedded`"
        ) from error


def _reason(error: Exception, name: str) -> str:
    """What the Hub says, where transformers passes it on: a gated model, no right to read it."""
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        return f"it is an adapter; merge it into its base first: fnsft export {name} --to merged --output_dir DIR"
    cause = error.__cause__
    known = (
        None
        if cause is None or isinstance(cause, (EntryNotFoundError, RevisionNotFoundError))
        else explain(cause, name)
    )
    return known or str(error).strip().splitlines()[0]


def load_model_and_tokenizer(name_or_path: str, dtype: str = "float32"):
    """Load a causal language model and its tokenizer.

    Raises:
        FNSFTError: it is not found, or is not a causal language model.
    """
    path = resolve_model(name_or_path)
    with model_errors(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model, tokenizer


def check_attention(name: str | None) -> None:
    """Check that transformers knows an attention implementation; a kernel on the Hub (org/name) may be anything.

    Raises:
        FNSFTError: it does not.
    """
    known = ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()))
    if name is not None and "/" not in name and name not in known:
        raise FNSFTError(f"attn_implementation is {name!r}; it must be one of: {', '.join(known)}")


def default_lora_targets(config: PretrainedConfig) -> list[str] | None:
    """The modules for LoRA to train when none are named: PEFT's own choice (`None`) where it has one.

    For architectures that PEFT's table lacks: the up, gate and down projections of the MLPs.

    Raises:
        FNSFTError: the model has no MLP that is understood either, or its MLPs are experts.
    """
    if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
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
