"""fnsft train: TRL's SFT with a FunctionalNetworkConfig. Also `python -m fnsft_trl.cli.train` under accelerate."""

import difflib
import re
import sys
from dataclasses import fields

import yaml

from ..config import FunctionalNetworkConfig
from ..data.config import DataConfig
from ..errors import FNSFTError
from . import run_verb
from .arguments import check_writable


def main(argv: list[str]) -> None:
    from datasets import disable_caching
    from transformers import AutoConfig, AutoProcessor
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )

    from ..data.training import load_training_data
    from ..embedded import resolve_model
    from ..trainer import FNSFTTrainer
    from .models import model_errors

    logger = logging.get_logger("fnsft_trl")

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise FNSFTError(f"{message} (see --help)")

    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, DataConfig, FunctionalNetworkConfig)
    known = [f.name for kind in kinds for f in fields(kind)]
    parser = Parser(kinds, prog="fnsft train", allow_abbrev=False)
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    argv, settings = _normalise(argv, known, lists)
    parser.set_defaults_with_config(**settings)
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv)
    except FNSFTError:
        raise
    except (ValueError, TypeError) as error:  # what TRL and transformers say of their own fields
        raise FNSFTError(" ".join(str(error).split())) from error
    script_args, training_args, model_args, mixture, data_config, network_config = parsed
    given = {name.removeprefix("no_") for name in _flags(argv)} | {k for k, v in settings.items() if v is not None}
    if not given & set(FunctionalNetworkConfig.field_names()):
        logger.warning("no option of functional networks was given: this is plain supervised fine-tuning")
        network_config = None
    if model_args.model_name_or_path is None:
        raise FNSFTError("model_name_or_path is missing; give a Hub id, a directory, or `embedded`")
    peft_config = get_peft_config(model_args)
    if network_config is not None:
        network_config.plan(lora_config=peft_config is not None)
    output_dir = check_writable(training_args.output_dir)
    resume = training_args.resume_from_checkpoint
    if str(resume).lower() == "true":
        resume = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if resume is None:
            raise FNSFTError(f"there is no checkpoint in {output_dir} to resume from; drop resume_from_checkpoint")

    name = resolve_model(model_args.model_name_or_path)
    with model_errors(model_args.model_name_or_path):
        options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
        AutoConfig.from_pretrained(name, **options)
        processing_class = AutoProcessor.from_pretrained(name, **options)
    if not data_config.tokenized_cache:
        disable_caching()  # of TRL's own steps too
    data = load_training_data(script_args, training_args, mixture, data_config, processing_class)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = FNSFTTrainer(
        model=name,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=data.processing_class,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
        network_config=network_config,
        tokenized_cache=data_config.tokenized_cache,
    )
    if trainer.network_config is not None:
        logger.warning(
            f"selected {trainer.neuron_mask}; trainable: {trainer.trainable_neurons.count} neurons, method "
            f"{trainer.plan.method}, mask {trainer.plan.mask_mode or 'off'}"
        )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Model saved to: {training_args.output_dir}")


def _flags(argv: list[str]) -> list[str]:
    return [token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")]


def _normalise(argv: list[str], known: list[str], lists: set[str]) -> tuple[list[str], dict]:
    """Take the YAML file out of the arguments, check every name, and write `[0,1]` as argparse reads lists."""
    arguments: list[str] = []
    settings: dict = {}
    tokens = iter(argv)
    for token in tokens:
        if token == "--config" or token.startswith("--config="):
            path = token.partition("=")[2] or next(tokens, None)
            settings = _read_yaml(path, known)
        elif (match := re.fullmatch(r"\[([^{}]*)\]", token)) and set(_flags(arguments[-1:])) & lists:
            arguments += [item.strip() for item in match[1].split(",") if item.strip()]
        elif (match := re.fullmatch(r"(--\w+)=\[([^{}]*)\]", token)) and match[1][2:] in lists:
            arguments += [match[1], *(item.strip() for item in match[2].split(",") if item.strip())]
        else:
            arguments.append(token)
    for name in _flags(arguments):
        if name != "help" and name.removeprefix("no_") not in known and name not in known:
            raise FNSFTError(f"there is no option --{name}{_nearest(name, known)}")
    return arguments, settings


def _read_yaml(path: str | None, known: list[str]) -> dict:
    try:
        with open(path or "", encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except OSError as error:
        raise FNSFTError(f"the config file {path!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise FNSFTError(f"the config file {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise FNSFTError(f"the config file {path} must hold a mapping of option names to values")
    for name in settings:
        if name not in known:
            raise FNSFTError(f"{path}: there is no option {name!r}{_nearest(str(name), known)}")
    return settings


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
