"""Engine: what shards the weights of a run over its processes, and what does not run on it."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import distributed as dist
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..compat.accelerate import parse_flag_from_env
from ..errors import FNSFTError


logger = logging.get_logger(__name__)


class Refusal(NamedTuple):
    """What does not run on some engines.

    Attributes:
        what (`str`): how a message calls it.
        engines (`tuple[str, ...]`): the beginnings of their names.
        reason (`str`): why.
        remedy (`str`): what to do instead.
    """

    what: str
    engines: tuple[str, ...]
    reason: str
    remedy: str


_ALL = ("FSDP", "DeepSpeed")
_DATA_PARALLEL = "use plain data parallelism"
# What may be asked of a run -> where it does not run.
REFUSALS = {
    "sharding": Refusal(
        "a run of this package", ("FSDP1",), "whose flat parameters hold no neurons", "set fsdp_version to 2"
    ),
    "tensor_parallel": Refusal(
        "tensor_parallel",
        ("DeepSpeed",),
        "which splits neurons over processes that know of their own only",
        "drop it from the DeepSpeed config",
    ),
    "full": Refusal(
        "train_method=full",
        ("DeepSpeed",),
        "whose optimizer holds copies of the weights in which frozen neurons move",
        f"use FSDP2, {_DATA_PARALLEL[4:]}, or train_method=neuron_delta",
    ),
    "dora": Refusal(
        "DoRA held to neurons",
        _ALL,
        "where other tensors take the magnitudes' place",
        f"{_DATA_PARALLEL}, or plain LoRA",
    ),
    "expert_lora": Refusal(
        "LoRA on the weights of experts, held to neurons,",
        _ALL,
        "where other tensors take the place of its factors",
        f"{_DATA_PARALLEL}, or train_method=neuron_delta",
    ),
    "experts": Refusal(
        "a mixture of experts",
        ("DeepSpeed ZeRO-3",),
        "which gathers weights for whole modules only",
        "use DeepSpeed ZeRO-2, or FSDP2",
    ),
    "whole_modules": Refusal(
        "an adapter with modules_to_save, trainable_token_indices or another init_lora_weights than the default",
        ("DeepSpeed ZeRO-3",),
        "where PEFT would read weights that are empty",
        "use DeepSpeed ZeRO-2, FSDP2, or drop it",
    ),
    "earlier_adapter": Refusal(
        "adapter_name_or_path",
        ("DeepSpeed ZeRO-3",),
        "where the weights that an adapter is fitted to are empty",
        "merge it first (fnsft export --to merged), or use DeepSpeed ZeRO-2 or FSDP2",
    ),
    "rounding": Refusal(
        "LoRA held to neurons, with an optimizer of 8 bits or of compressed gradients,",
        _ALL,
        "where nothing puts back the frozen factors that its rounding moves",
        "use one with state in 32 bits, such as adamw_torch",
    ),
    "protect": Refusal("protect", _ALL, "where no process has a weight as a whole", f"{_DATA_PARALLEL}, or drop it"),
    "kl_to_base": Refusal("kl_to_base", _ALL, "where a batch has one backward pass", f"{_DATA_PARALLEL}, or drop it"),
    "penalties": Refusal(
        "ewc, lwf and olora", _ALL, "where no process has a weight as a whole", f"{_DATA_PARALLEL}, or drop them"
    ),
    "rollback": Refusal(
        "retention_on_budget=rollback",
        _ALL,
        "where no process has a copy of the weights to go back to",
        "use stop, and load_best_model_at_end for the best checkpoint within the budget",
    ),
    "full_eval": Refusal(
        "bf16_full_eval or fp16_full_eval",
        _ALL,
        "where weights that were cast for an evaluation cannot be put back",
        "drop the option",
    ),
}


@dataclass(frozen=True)
class Engine:
    """
    What shards weights, gradients or optimizer state over the processes of a run.

    Attributes:
        name (`str`): `FSDP1`, `FSDP2`, or `DeepSpeed ZeRO-N` with the stage N.
        splits_neurons (`bool`): whether it splits weights by their neurons too (tensor parallelism).
        optimizer (`str`): the name of the optimizer that its own config asks for; empty without.
        processes (`int` or `None`): how many of them accelerate knows of, where that is known.
    """

    name: str
    splits_neurons: bool = False
    optimizer: str = ""
    processes: int | None = None

    @classmethod
    def of_args(cls, args: TrainingArguments | None) -> "Engine | None":
        """That which arguments and the environment of a launch ask for, before anything is loaded; `None` without.

        Args:
            args: of the trainer; without any, the environment alone speaks.
        """
        plugin = None if args is None else args.deepspeed_plugin
        if plugin is not None:
            return cls._of_deepspeed(plugin, args)
        if args is not None and args.fsdp_plugin_args is not None:
            return cls(f"FSDP{args.fsdp_plugin_args.get('fsdp_version', 1)}", processes=args.world_size)
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            return cls(f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}")
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return cls(f"FSDP{os.environ.get('FSDP_VERSION', '1')}")
        return None

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> "Engine | None":
        """That of a trainer; `None` where each process holds the whole model."""
        state = trainer.accelerator.state
        if trainer.is_deepspeed_enabled:
            return cls._of_deepspeed(state.deepspeed_plugin, trainer.args)
        if not trainer.is_fsdp_enabled:
            return None
        return cls(f"FSDP{state.fsdp_plugin.fsdp_version}", processes=trainer.args.world_size)

    @classmethod
    def _of_deepspeed(cls, plugin, args: TrainingArguments) -> "Engine":
        config = plugin.hf_ds_config.config
        split = config.get("tensor_parallel", {}).get("autotp_size", 1) > 1
        optimizer = str(config.get("optimizer", {}).get("type", ""))
        return cls(f"DeepSpeed ZeRO-{plugin.zero_stage}", split, optimizer, args.world_size)

    @property
    def rounds(self) -> bool:
        """Whether the optimizer of its config compresses what it moves weights by."""
        return self.optimizer.lower().startswith(("onebit", "zeroone"))

    def check(self, asked: Iterable[str]) -> None:
        """Refuse what does not run on this engine.

        Args:
            asked: what is asked of the run, keys of `REFUSALS`.

        Raises:
            FNSFTError: naming the first that does not run, why, and what to do; or accelerate does not know of all
                processes.
        """
        if dist.is_initialized() and self.processes not in (None, count := dist.get_world_size()):
            raise FNSFTError(
                f"accelerate knows of {self.processes} of the {count} processes of this launch (it has no way for "
                f"{self.name} on a CPU), so each would train all rows; use plain data parallelism (use_cpu)"
            )
        own = ["sharding", *(["tensor_parallel"] if self.splits_neurons else [])]
        for key in (*own, *asked):
            refusal = REFUSALS[key]
            if self.name.startswith(refusal.engines):
                is_many = " and " in refusal.what
                raise FNSFTError(
                    f"{refusal.what} {'do' if is_many else 'does'} not run under {self.name}, {refusal.reason}; "
                    f"{refusal.remedy}"
                )


def check_engine(trainer: Trainer, expected: Engine | None, asked: Callable[[Engine], Iterable[str]]) -> None:
    """Check, when a trainer is made, that what shards its model is what its arguments have said; warn if nothing does.

    Args:
        trainer: the trainer.
        expected: what [`Engine.of_args`] has found.
        asked: what is asked of an engine.

    Raises:
        FNSFTError: others have made the state of accelerate, and something does not run so.
    """
    found = Engine.of_trainer(trainer)
    if found is None and expected is not None:
        logger.warning(f"nothing is sharded: accelerate takes no {expected.name} here, but plain data parallelism")
    elif found != expected:
        found.check(asked(found))
