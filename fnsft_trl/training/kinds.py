"""TrainerKind: what a class of trainers takes and does, read from its constructor."""

import inspect
import os
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..errors import FNSFTError
from ..neurons.sites import base_model


class TrainerKind:
    """A class of trainers, of TRL or of anybody.

    Args:
        trainer_class (`type`): the class, without networks.

    Attributes:
        takes (`set[str]`): the names of its arguments.
        is_sft (`bool`): whether it is an SFTTrainer.
        wraps (`bool`): whether it wraps the model with the `peft_config` that it is given.
        is_of_trl (`bool`): whether it loads the model's tokenizer itself where none is given.
        generates (`bool`): whether it generates answers, to be rewarded.
        scores (`bool`): whether it trains a reward model.
        takes_reference (`bool`): whether it takes a reference model; those that generate only load one.
    """

    def __init__(self, trainer_class: type[Trainer]) -> None:
        self.trainer_class = trainer_class
        self.order, self.takes = _arguments(trainer_class)
        self.is_sft = issubclass(trainer_class, SFTTrainer)
        self.wraps = "peft_config" in self.takes
        self.is_of_trl = "quantization_config" in self.takes
        self.generates = "reward_funcs" in self.takes
        self.takes_reference = "ref_model" in self.takes
        self.scores = any(base.__name__ == "RewardTrainer" for base in trainer_class.__mro__)

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names; a model's path is its name.

        Raises:
            FNSFTError: the training arguments are something else.
            TypeError: as Python has it.
        """
        if len(args) > len(self.order):
            raise TypeError(f"{self.trainer_class.__name__} takes {len(self.order)} arguments by position")
        given = dict(zip(self.order, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise TypeError(f"{self.trainer_class.__name__} got multiple values for argument {min(twice)!r}")
        given |= kwargs
        if isinstance(given.get("model"), os.PathLike):
            given["model"] = os.fspath(given["model"])
        if not isinstance(given.get("args"), TrainingArguments | None):
            raise FNSFTError(
                f"args is a {type(given['args']).__name__}; expected training arguments, such as an SFTConfig"
            )
        return given

    def model_of(self, given: dict[str, Any]) -> str | PreTrainedModel | PeftModel:
        """The model among the arguments.

        Raises:
            FNSFTError: there is none, or a function that makes one.
        """
        model = given.get("model")
        if model is None:
            raise FNSFTError(
                f"{self.trainer_class.__name__} is given no model; with a network_config it needs one, and no "
                "model_init, since the networks are those of this one model"
            )
        if not isinstance(model, str) and not isinstance(base_model(model), PreTrainedModel):
            raise FNSFTError(
                f"the model is a {type(model).__name__}; expected one of transformers, with or without an adapter, or "
                "its name"
            )
        return model

    def args_of(self, given: dict[str, Any]) -> TrainingArguments:
        """The training arguments; those of an SFTTrainer have a default.

        Raises:
            FNSFTError: there are none.
        """
        if given.get("args") is not None:
            return given["args"]
        if not self.is_sft:
            raise FNSFTError(
                f"{self.trainer_class.__name__} is given no args; with a network_config it needs them "
                '(args=...(output_dir="..."))'
            )
        model = given["model"]
        name = model if isinstance(model, str) else model.config.name_or_path
        return SFTConfig(f"{name.rstrip('/').split('/')[-1]}-FNSFT")

    def wrapped(
        self, model: PreTrainedModel | PeftModel, adapter: PeftConfig | None, args: TrainingArguments
    ) -> PreTrainedModel | PeftModel:
        """The model with an adapter, for a trainer that does not put it on."""
        if adapter is not None:
            model = get_peft_model(model, adapter)
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            # https://github.com/huggingface/transformers/issues/42489
            model.enable_input_require_grads()
        return model


def _arguments(trainer_class: type[Trainer]) -> tuple[list[str], set[str]]:
    """The names of a constructor's arguments that may be given by position, and of all that it takes; a constructor
    that hands others on takes those of its parent."""
    order: list[str] | None = None
    names: set[str] = set()
    for owner in trainer_class.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        passes_positions = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        order = named if order is None else order
        if passes_positions and not named:
            order = None  # the parent's
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return order or [], names
