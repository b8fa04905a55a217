"""NeuronTunerConfig: which neurons get a delta."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum

from peft import LoraConfig, PeftConfig

from ..errors import FNSFTError


# Arguments of a LoraConfig that the configuration of the whole adapter has itself, ...
_OF_THE_ADAPTER = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
}
# ... and those that would change more than the modules that LoRA is put on.
_BEYOND_LORA = {"bias", "layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices"}
# Values of init_lora_weights, or beginnings of them, that change the base weights: without the adapter, the model
# would not be the base model.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NeuronPeftType(StrEnum):
    """The method's name in PEFT's tables: like a member of `peft.PeftType`, and equal to its string."""

    NEURON_DELTA = "NEURON_DELTA"


@dataclass
class NeuronTunerConfig(PeftConfig):
    """Configuration of neuron deltas: each selected neuron gets a trainable change of its weights.

    The base model is frozen. Neuron j's delta covers its rows of the up and gate projections (and their biases) and
    its column of the down projection. At `mlp_output` it covers row j of the down projection and that entry of its
    bias.
    Weight decay pulls a delta, and so the weights, towards the pretrained values (L2-SP).

    Args:
        neurons (`dict[str, str]`):
            The selected neurons: layer -> neuron numbers as ranges, for instance `{"3": "0-5,17"}`. Written by
            [`NeuronMask.to_ranges`].
        site (`str`, *optional*, defaults to `"mlp_intermediate"`):
            The site whose neurons are numbered: `mlp_intermediate` or `mlp_output`.
        target_modules (`list[str]`, *optional*):
            Filled in from the neurons; not to be set.
        modules_to_save (`list[str]`, *optional*):
            Modules outside the adapter to train and save as a whole, for instance `["lm_head"]` for added tokens.
            Modules with a part of the MLPs are refused.
        trainable_token_indices (`dict[str, list[int]]`, *optional*):
            Rows of the embedding that train too, for tokens added to the tokenizer.
        lora ([`~peft.LoraConfig`] or `dict`, *optional*):
            LoRA beside the deltas, on modules outside the MLPs: a configuration, or its arguments, for instance
            `{"r": 8, "target_modules": ["q_proj", "v_proj"]}`. It is part of the adapter: switched, saved, loaded and
            merged with it. Kept as a `dict` of the arguments that are not at their defaults.

    Raises:
        FNSFTError: no neuron is selected, or `lora` is no LoRA configuration with `target_modules`, or one that asks
            for more than LoRA on these modules.
    """

    neurons: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Selected neurons: layer -> ranges of neuron numbers."}
    )
    site: str = field(default="mlp_intermediate", metadata={"help": "mlp_intermediate or mlp_output."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Filled in from the neurons."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the adapter to train and save as a whole."}
    )
    trainable_token_indices: dict[str, list[int]] | list[int] | None = field(
        default=None, metadata={"help": "Rows of the embedding that train too, for added tokens."}
    )

    lora: LoraConfig | dict | None = field(
        default=None, metadata={"help": "LoRA beside the deltas, outside the MLPs: arguments of a LoraConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NeuronPeftType.NEURON_DELTA
        if not isinstance(self.neurons, dict):
            raise FNSFTError(f"neurons is {self.neurons!r}; a mapping of layers to ranges was expected")
        self.neurons = {str(layer): spec for layer, spec in self.neurons.items()}
        if not self.neurons:
            raise FNSFTError("NeuronTunerConfig selects no neuron; give neurons=mask.to_ranges()")
        if self.lora is not None:
            self.lora = _lora_arguments(self.lora)


def _lora_arguments(lora: LoraConfig | dict) -> dict:
    """The arguments of a LoraConfig that are not at their defaults, as JSON values."""
    if isinstance(lora, dict):
        try:
            lora = LoraConfig(**lora)
        except TypeError as error:
            raise FNSFTError(f"lora has no arguments of a LoraConfig: {error}") from error
    plain = LoraConfig()
    given = {f.name: getattr(lora, f.name) for f in fields(lora) if getattr(lora, f.name) != getattr(plain, f.name)}
    given = {name: value for name, value in given.items() if name not in _OF_THE_ADAPTER}
    if refused := given.keys() & _BEYOND_LORA:
        name = sorted(refused)[0]
        raise FNSFTError(f"lora sets {name}, which reaches beyond the modules that LoRA is put on; drop {name} there")
    init = str(given.get("init_lora_weights"))
    if init.startswith(_CHANGING_INITS):
        raise FNSFTError(f"lora has init_lora_weights={init!r}, which changes the base weights; use another one")
    if "alora_invocation_tokens" in given:
        raise FNSFTError("lora has alora_invocation_tokens, which have no effect beside neuron deltas; drop them")
    if given.get("target_modules") in (None, "all-linear"):
        raise FNSFTError('lora needs target_modules by name, outside the MLPs, for instance ["q_proj", "v_proj"]')
    return {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
