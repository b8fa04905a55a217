"""What is needed of transformers beyond its public interface. Seen in transformers 5.23.0."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

# Weights under ZeRO-3 are empty outside of a forward pass, and those under FSDP with cpu_ram_efficient_loading are
# there in one process only. The package that exports both is not documented.
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/__init__.py
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled, is_fsdp_enabled

# What the Trainer does before it trains: a model's configurations get the special tokens of the tokenizer.
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_utils.py
from transformers.trainer_utils import align_special_tokens


__all__ = [
    "EXPERTS_FORM",
    "TRAINER_STATE_FILE",
    "align_special_tokens",
    "apply_gate",
    "installed_trackers",
    "is_deepspeed_zero3_enabled",
    "is_expert_parallel",
    "is_fsdp_enabled",
    "loads_whole",
    "tracker_names",
]

# What the decorator `use_experts_implementation` writes on a module that holds the weights of all experts of a layer:
# how they lie in their tensors. Without all of them the layer is not understood.
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/moe.py
EXPERTS_FORM = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")

# The file of a checkpoint that holds the state of the Trainer; its name is a constant of `transformers.trainer`, which
# takes seconds to import.
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py
TRAINER_STATE_FILE = "trainer_state.json"


def apply_gate(experts: nn.Module, values: Tensor) -> Tensor:
    """What the gate of an experts module makes of gate and up projection: (tokens, 2 * units) -> (tokens, units).

    Architectures differ in it (clamps, interleaved gates), and only this method knows; the experts' forward computes
    all of them at once and gives no access to one expert's activations.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/moe.py
    """
    return experts._apply_gate(values)


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether an experts module holds a part of the experts only, the others being in other processes.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/distributed/expert_parallel.py
    """
    return bool(vars(experts).get("_is_expert_parallel"))


@contextmanager
def loads_whole() -> Iterator[None]:
    """A block in which this process loads models whole, beside a run under ZeRO-3 too, which has all of them sharded.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/deepspeed.py
    """
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def tracker_names() -> list[str]:
    """The names that `report_to` takes, installed or not; `TrainingArguments` declare it as any string.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/integration_utils.py
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    return sorted(INTEGRATION_TO_CALLBACK)


def installed_trackers() -> list[str]:
    """The names that `report_to` takes on this machine. Of flyte it is not said, so it counts as installed.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/integration_utils.py
    """
    from transformers.integrations import get_available_reporting_integrations

    return [*get_available_reporting_integrations(), "flyte"]
