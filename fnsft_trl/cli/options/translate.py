"""The original project's option names in terms of TRL's and ours. Free of torch."""

from dataclasses import replace
from typing import Any

from ...data.prompts import TEMPLATE_FORMATS, parse_prompt_template
from ...errors import FNSFTError
from .schema import Option
from .sources import under_own_names


# Another name for the same thing.
RENAMED = {
    "dataset_name_or_path": "dataset_name",
    "dataset_config_name": "dataset_config",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "use_4bit": "load_in_4bit",
    "use_8bit": "load_in_8bit",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "validation_split": "eval_fraction",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "wandb_run_name": "run_name",
    "hub_repo_id": "hub_model_id",
    "hub_private": "hub_private_repo",
    "ica_mask_layers": "ica_layers",
    "ica_pca_preprocessing_components": "ica_rank",
    "ica_build_templates_from": "ica_datasets",
}
# Switches, and what they become when they are on.
SWITCHES = {"no_peft": "use_peft: false", "use_wandb": "report_to: wandb"}
# Names that nothing needs to be done for here, and why.
DROPPED = {
    "use_auth_token": "the token of HF_TOKEN, of .env or of `hf auth login` is always used",
    "auto_detect_format": "the format of a dataset is always detected",
    "lora_bias": "LoRA trains no biases here",
    "bnb_4bit_compute_dtype": "4-bit weights are computed with in the precision of dtype",
    "upload_merged_model": "the whole output directory is uploaded, a merged model with it",
    "push_adapter_only": "the whole output directory is uploaded, a merged model with it",
    "response_max_length": "max_length bounds the tokens of a whole row",
    "instruction_max_length": "max_length bounds the tokens of a whole row",
    "use_existing_splits": "the split for an evaluation that a dataset has is always used",
    "anti_drift_unwrap_on_save": "nothing is wrapped in what is saved",
    "pretokenize": "rows are always tokenised before the training, and kept: tokenized_cache, dataset_num_proc",
}
# Of those, what their false would ask for, and what to write instead.
_NOT_OFF = {
    "use_existing_splits": "would hold out rows of the training data although there is a split for that: write "
    "datasets: [{path: NAME, split: train}] and eval_fraction",
    "anti_drift_unwrap_on_save": "would save weights that only this training could load: drop it",
}
INSTRUCTION = "instruction_template"
# Fields of FunctionalNetworkConfig that the original has: without a mask_mode it does not use them.
NETWORK_NAMES = {
    *("mask_mode", "ica_template_path", "ica_component_ids", "ica_components", "ica_percentile", "ica_layers"),
    *("ica_dtype", "ica_rank", "ica_datasets", "ica_template_samples_per_ds"),
    *("anti_drift_row_param", "anti_drift_apply_to"),
}
# Those of a discovery, which a template that is loaded has behind it.
DISCOVERY_NAMES = ("ica_components", "ica_dtype", "ica_rank", "ica_datasets", "ica_template_samples_per_ds")
# The value of `dtype` for `torch_dtype: auto`. TRL's own `auto` is the precision of the checkpoint.
DEVICE_DTYPE = "device"


def original_options(options: dict[str, Option]) -> dict[str, Option]:
    """The options under the names that only the original has, given those of `fnsft train`."""
    switches = {*SWITCHES, *_NOT_OFF, "use_auth_token", "auto_detect_format"}
    switches |= {"upload_merged_model", "push_adapter_only"}
    found = {old: replace(options[new], nullable=True) for old, new in RENAMED.items()}
    found["warmup_ratio"] = replace(found["warmup_ratio"], highest=0.999)  # from 1 on it would be a number of steps
    found |= {name: Option(name, "", "bool", nullable=True) for name in switches}
    texts = [*(name for name in DROPPED if name not in switches), INSTRUCTION]
    found |= {name: Option(name, "", "str", nullable=True) for name in texts}
    found["pretokenize"] = replace(found["pretokenize"], many=True, text=True, switch=True, family=True)
    return found


def translate(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate the options of one source, the command line or a YAML file.

    Args:
        given: name as it was written -> value.

    Returns:
        Name as it is here -> value; and the original's names that were used -> what they are here.

    Raises:
        FNSFTError: an option stands there under two names, or two of the switches contradict each other.
    """
    idle = {name: reason for name in given if (reason := _needless(name)) is not None}
    first = {reason: name for name, reason in reversed(idle.items())}
    used = {name: f"nothing ({reason})" if first[reason] == name else "nothing" for name, reason in idle.items()}
    for name in idle.keys() & _NOT_OFF.keys():
        if given[name] is False:
            raise FNSFTError(f"{name}: false {_NOT_OFF[name]}")
    used |= {old: new for old, new in RENAMED.items() if given.get(old) is not None}
    others = {*SWITCHES, *idle, INSTRUCTION}
    values = under_own_names({name: value for name, value in given.items() if name not in others}, RENAMED)
    for old in given.keys() & RENAMED.keys() - used.keys():  # whose null is the default, as there
        del values[RENAMED[old]]
    if given.get("no_peft") is not None:
        if values.get("use_peft") is not None:
            raise FNSFTError("no_peft and use_peft are two names of one option; drop no_peft")
        values["use_peft"] = not given["no_peft"]
    if given.get(INSTRUCTION) is not None:
        used[INSTRUCTION] = _set_instruction(values, given[INSTRUCTION])
    if given.get("use_wandb") is not None:
        _report_to_wandb(values, given["use_wandb"])
    used |= {name: new for name, new in SWITCHES.items() if given.get(name)}
    if given.get("torch_dtype") == "auto":
        values["dtype"] = DEVICE_DTYPE
        used["torch_dtype"] = "dtype, chosen for the device"
    if values.get("attn_implementation") == "auto":  # the original's word for the default
        del values["attn_implementation"]
    return values, used


def _needless(name: str) -> str | None:
    """Why nothing needs to be done for a name of the original; `None` of others."""
    return DROPPED.get("pretokenize" if name.startswith("pretokenize_") else name)


def _set_instruction(values: dict[str, Any], template: str) -> str:
    """Read `instruction_template`: the name of a prompt format, or the text around the instruction and the answer.

    Returns:
        What it is here.
    """
    others = [
        name for name in ("template_format", "prompt_template") if values.get(name) not in (None, "auto", "basic")
    ]
    if others:
        raise FNSFTError(f"{INSTRUCTION} and {others[0]} both say how a row is written; drop {INSTRUCTION}")
    if template in TEMPLATE_FORMATS:
        values["template_format"] = template
        return "template_format"
    if "{response}" not in template:
        template += "{response}"
    try:
        parse_prompt_template(template)
    except FNSFTError as error:
        raise FNSFTError(
            f"{INSTRUCTION} cannot be read as a prompt_template ({error}); write template_format: basic and "
            'prompt_template: "...{instruction}...{response}"'
        ) from error
    values |= {"template_format": "basic", "prompt_template": template}
    return "template_format: basic with prompt_template"


def _report_to_wandb(values: dict[str, Any], use_wandb: bool) -> None:
    trackers = values.get("report_to") or []
    trackers = [trackers] if isinstance(trackers, str) else list(trackers)
    if use_wandb and "none" in trackers:
        raise FNSFTError("use_wandb with report_to: none contradict each other; drop one of them")
    if not use_wandb and "wandb" in trackers:
        raise FNSFTError("use_wandb: false with report_to: wandb contradict each other; drop one of them")
    if use_wandb:
        values["report_to"] = [*trackers, *(["wandb"] if "wandb" not in trackers else [])]
