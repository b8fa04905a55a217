"""What is needed of PEFT beyond its public interface. Seen in PEFT 0.21.2."""

import re
from functools import wraps

from peft import PeftConfig, PeftType, inject_adapter_in_model

# A method of PEFT's own kind is made of these tables; `register_peft_method` insists on a member of an enum of PEFT.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/mapping.py
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

# Buffers by name, beside `ParameterDict`: positions of neurons, which move with their layer and are not saved.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/_buffer_dict.py
from peft.tuners._buffer_dict import BufferDict

# The layers of LoRA: which modules have factors, and which of them wrap a bare parameter (`parameter_name`,
# `num_experts`) and use the factors without calling them.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
from peft.tuners.lora import LoraLayer, ParamWrapper

# What a PEFT method derives from (their hooks are in `methods.py`), which modules a configuration names, and which of
# the adapters that are asked for a layer has not merged yet.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)

# How names of parameters in a file become names in a model, for transformers' own loader of adapters, which looks the
# function up there at every call.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py
from peft.utils import transformers_weight_conversion as conversion

# The modules that LoRA adapts where none are named, by type of model: where there is no entry, PEFT refuses.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/constants.py
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

# A weight as DoRA sees it, of a quantised layer too: its norms are those of the dequantised values.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/integrations.py
from peft.utils.integrations import dequantize_module_weight

# Which entry of a rank_pattern or an alpha_pattern holds for a module.
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.core_model_loading import WeightRenaming


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "LoraLayer",
    "ParamWrapper",
    "add_method",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "dequantize_module_weight",
    "get_pattern_key",
    "has_lora_targets",
    "inject_beside",
]


def add_method(name: str, config: type[PeftConfig], tuner: type[BaseTuner], *, ending: str = "") -> None:
    """Make a PEFT method known to `get_peft_model`, `PeftModel.from_pretrained` and all that builds on them.

    transformers' own loader (`AutoModel.from_pretrained` of a folder with an adapter, `model.load_adapter`) asks PEFT
    how names in a file become names in a model. PEFT answers for one kind of parameters a method: those of LoRA, which
    may stand beside this method's, would be left out.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py

    Args:
        name: as it stands in `adapter_config.json`, under `peft_type`.
        config: the class of its configuration.
        tuner: the class of its models.
        ending: what follows an adapter's name in the names of its parameters, and does not stand in files.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
    answer = conversion.build_peft_weight_mapping

    @wraps(answer)
    def with_all_names(weight_conversions, adapter_name, peft_config=None):
        found = answer(weight_conversions, adapter_name, peft_config=peft_config)
        if found and peft_config is not None and peft_config.peft_type == name:
            lora, own = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA], re.escape(tuner.prefix)
            found.append(WeightRenaming(rf"({lora}[^\.]*)", rf"\1.{adapter_name}"))
            found.append(WeightRenaming(rf"({own}[^\.]*\.{re.escape(adapter_name)})$", rf"\1{ending}"))
        return found

    conversion.build_peft_weight_mapping = with_all_names


def inject_beside(config: PeftConfig, model: nn.Module, adapter_name: str) -> None:
    """Put an adapter into a model that another one, which is not of PEFT's own methods, is being put into.

    PEFT notes the configurations of a model on it, and takes those that it finds there for its own.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py

    Args:
        config: of a method of PEFT's own.
        model: the model, changed in place.
        adapter_name: the name that both have.
    """
    noted = vars(model).pop("peft_config", None)
    try:
        inject_adapter_in_model(config, model, adapter_name)
    finally:
        vars(model).pop("peft_config", None)
        if noted is not None:
            model.peft_config = noted


def has_lora_targets(model_type: str) -> bool:
    """Whether PEFT itself knows which modules of a type of model LoRA adapts."""
    return model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
