"""NeuronTunerConfig: which neurons get a delta."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from peft import LoraConfig
from peft.config import PeftConfig

from ..errors import FNSFTError


class NeuronPeftType(str, Enum):
    """The method's name in PEFT's tables: like a member of `peft.PeftType`, and equal to its string."""

    NEURON_DELTA = "NEURON_DELTA"


@dataclass
class NeuronTunerConfig(PeftConfig):
    """Configuration of neuron deltas: each selected neuron gets a trainable change of its weights.

    The base model is frozen. Neuron j's delta covers its rows of the up and gate projections (and their biases) and
    its column of the down projection; at `mlp_output`, its row of the down projection and the entry of its bias.
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
            Modules that hold a part of the MLPs are refused.
        trainable_token_indices (`dict[str, list[int]]`, *optional*):
            Rows of the embedding that train too, for tokens added to the tokenizer.
        lora (`dict`, *optional*):
            LoRA beside the deltas, on modules outside the MLPs: the arguments of a [`~peft.LoraConfig`], for instance
            `{"r": 8, "target_modules": ["q_proj", "v_proj"]}`. It is part of the adapter: switched, saved, loaded and
            merged with it.

    Raises:
        FNSFTError: no neuron is selected, or `lora` is no LoRA configuration with `target_modules`.
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

    lora: dict | None = field(
        default=None, metadata={"help": "LoRA beside the deltas, outside the MLPs: arguments of a LoraConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NeuronPeftType.NEURON_DELTA
        self.neurons = {str(layer): spec for layer, spec in self.neurons.items()}
        if not self.neurons:
            raise FNSFTError("NeuronTunerConfig selects no neuron; give neurons=mask.to_ranges()")
        if self.lora is not None:
            if not self.lora.get("target_modules"):
                raise FNSFTError('lora needs target_modules, for instance ["q_proj", "v_proj"]')
            try:
                LoraConfig(**self.lora)
            except TypeError as error:
                raise FNSFTError(f"lora holds no arguments of a LoraConfig: {error}") from error
