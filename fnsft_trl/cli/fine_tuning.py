"""One run of `fnsft train`: what its options ask for is checked, the trainer made, the training run and exported."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_caching
from peft import PeftConfig
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from ..compat.transformers import loads_whole
from ..data.config import DataConfig
from ..data.embedded import resolve_model
from ..data.training import load_training_data
from ..errors import FNSFTError
from ..export.gguf import check_gguf_target, to_gguf
from ..occupied import ADAPTER, EXPORTED_MODEL, MODEL, TEMPLATE
from ..training.budget import RetentionBudgetExceeded
from ..training.checkpoints import find_checkpoint
from ..training.engines import Engine
from ..training.preparation import load_base_model
from ..training.refused import check_refused
from ..training.trainer import FNSFTTrainer
from ..tuner.saved import SavedAdapter
from .checks import check_checkpoint, check_training_arguments
from .logs import hush_repetitions
from .models import check_loading, default_lora_targets, loading_arguments, model_errors, source_arguments
from .options.loading import LoadingConfig
from .options.parse import TrainOptions
from .options.run_config import RunConfig
from .options.translate import DEVICE_DTYPE
from .output import check_writable
from .precision import Precision
from .refusals import refusals
from .templates import save_template


logger = logging.get_logger("fnsft_trl")

MERGED, GGUF = "merged", "model.gguf"  # in the output directory


@dataclass
class _Settings:
    """What the libraries are given, checked as far as it can be before anything is loaded."""

    training: SFTConfig
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    loading: LoadingConfig
    model_init_kwargs: dict[str, Any]
    peft: PeftConfig | None
    quantization: Any
    precision: Precision
    resume: str | None


def fine_tune(asked: TrainOptions) -> None:
    """Train as the options ask, save, export and push.

    Raises:
        FNSFTError: something that is asked for cannot be done, with what to do instead.
    """
    run = RunConfig(**asked.of(RunConfig))
    settings = _settings(asked)
    trainer = _trainer(asked, settings)
    args = trainer.args
    if run.ica_template_output and trainer.is_world_process_zero():
        save_template(trainer.network_template, run.ica_template_output)
    failure = None
    try:
        trainer.train(resume_from_checkpoint=settings.resume)
    except RetentionBudgetExceeded as error:  # the model is its base again, and is saved as such
        failure = error
    trainer.save_model(args.output_dir)
    trainer.create_model_card()
    if failure is not None:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        raise FNSFTError(f"{failure}. It is saved to {args.output_dir}; nothing is exported or pushed") from failure
    if trainer.is_world_process_zero():
        with loads_whole():  # the others do not load with this process
            _export(run, Path(args.output_dir).expanduser())
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        message = {"commit_message": run.hub_commit_message} if run.hub_commit_message else {}
        trainer.push_to_hub(dataset_name=settings.script.dataset_name, **message)
    trainer.accelerator.print(f"Model saved to: {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that ends in a group it has not left can abort


def make_trainer(
    asked: TrainOptions, *, template: Path | None = None, held_out: Sequence[str] | None = None
) -> FNSFTTrainer:
    """The trainer of a run, which can still be trained.

    Args:
        asked: its options.
        template: a directory with its networks, in the place of those that it would find.
        held_out: datasets to evaluate on in the place of what it would hold out.

    Raises:
        FNSFTError: something that is asked for cannot be done, with what to do instead.
    """
    return _trainer(asked, _settings(asked), template=template, held_out=held_out)


def _settings(asked: TrainOptions) -> _Settings:
    given = asked.values
    if given.get("wandb_project"):
        os.environ["WANDB_PROJECT"] = given["wandb_project"]
    precision = Precision.choose(use_cpu=given.get("use_cpu"), bf16=given.get("bf16"), fp16=given.get("fp16"))
    model_settings = asked.of(ModelConfig)
    if model_settings.get("dtype") is None:
        model_settings["dtype"] = precision.default_dtype(frozen=asked.has_adapter)
    elif model_settings["dtype"] == DEVICE_DTYPE:
        model_settings["dtype"] = precision.dtype(frozen=asked.has_adapter)
    with refusals():
        training = SFTConfig(**asked.of(SFTConfig) | precision.training_arguments)
        script = ScriptArguments(**asked.of(ScriptArguments))
        mixture = DatasetMixtureConfig(**asked.of(DatasetMixtureConfig))
        model = ModelConfig(**model_settings)
        peft, quantization = get_peft_config(model), get_quantization_config(model)
    if peft is not None:
        peft.revision = asked.values.get("model_revision")
    hush_repetitions(training.process_index)
    check_training_arguments(training, asked.retention)
    loading = LoadingConfig(**asked.of(LoadingConfig) | {"dtype": model.dtype})
    check_loading(loading, precision.device)
    return _Settings(
        training=training,
        script=script,
        mixture=mixture,
        loading=loading,
        model_init_kwargs=loading_arguments(loading) | (training.model_init_kwargs or {}),
        peft=peft,
        quantization=quantization,
        precision=precision,
        resume=_checkpoint(training, asked),
    )


def _checkpoint(training: SFTConfig, asked: TrainOptions) -> str | None:
    """The checkpoint to go on from; also checks the directories to write into."""
    model = {"the model to train": asked.values["model_name_or_path"]}
    check_writable(training.output_dir, ADAPTER if asked.has_adapter else MODEL, model)
    output_dir = Path(training.output_dir).expanduser()
    if asked.values.get("merge_adapter_with_base"):
        check_writable(output_dir / MERGED, EXPORTED_MODEL, model)
    if asked.values.get("convert_to_gguf"):
        check_gguf_target(output_dir / GGUF)
    if output := asked.values.get("ica_template_output"):
        check_writable(output, TEMPLATE, {**model, "the trained model (output_dir)": training.output_dir})
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training, has_mark=asked.network_config is not None)
    if checkpoint is None:
        return None
    check_checkpoint(checkpoint, adapter=asked.has_adapter)
    training.resume_from_checkpoint = str(checkpoint)  # from which the trainer takes the networks
    return str(checkpoint)


def _trainer(
    asked: TrainOptions,
    settings: _Settings,
    *,
    template: Path | None = None,
    held_out: Sequence[str] | None = None,
) -> FNSFTTrainer:
    """Load data and model, and make the trainer."""
    training, peft, data_config = settings.training, settings.peft, DataConfig(**asked.of(DataConfig))
    given_name = asked.values["model_name_or_path"]
    name = resolve_model(given_name)
    with model_errors(given_name):
        model_config = AutoConfig.from_pretrained(name, **source_arguments(settings.loading))
        processing_class = AutoProcessor.from_pretrained(name, **source_arguments(settings.loading))
    if not data_config.tokenized_cache:
        disable_caching()  # of TRL's own steps too
    data = load_training_data(
        settings.script, training, settings.mixture, data_config, processing_class, held_out=held_out
    )
    if peft is not None and asked.network_config is None and peft.target_modules is None:
        peft.target_modules = default_lora_targets(model_config)
    training.model_init_kwargs = settings.model_init_kwargs
    if training.process_index == 0:
        for note in asked.notes:
            print(f"fnsft train: note: {note}", file=sys.stderr)
    told = f"device: {settings.precision.device}; mixed precision: {settings.precision.mixed}"
    logger.warning(f"{told}; weights held in {settings.loading.dtype}")
    if asked.network_config is None:
        logger.warning("no functional networks were asked for: this is plain supervised fine-tuning")
    given = {
        "model": name,
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": data.processing_class,
        "quantization_config": settings.quantization,
        "peft_config": peft,
    }
    check_refused(given, training)
    given |= _trained_on(asked.values.get("adapter_name_or_path"), given, training)
    with refusals():
        trainer = FNSFTTrainer(
            args=training,
            **given,
            network_config=asked.network_config,
            network_template=template,
            tokenized_cache=data_config.tokenized_cache,
            retention=asked.retention,
            protection=asked.protection,
            replay=asked.replay,
            anchor=asked.anchor,
            penalties=asked.penalties,
        )
    if trainer.network_config is not None:
        logger.warning(
            f"selected {trainer.neuron_mask}; trainable: {trainer.trainable_neurons.count} neurons, method "
            f"{trainer.plan.method}, mask {trainer.plan.mask_mode or 'off'}"
        )
    return trainer


def _trained_on(directory: str | None, given: dict[str, Any], args: SFTConfig) -> dict[str, Any]:
    """What a trainer is given otherwise to train an earlier adapter on, if there is one."""
    if directory is None:
        return {}
    if (engine := Engine.of_args(args)) is not None:
        engine.check(["earlier_adapter"])
    adapter = SavedAdapter.read(Path(directory).expanduser())
    with model_errors(given["model"]):
        base = load_base_model(given["model"], args, args.model_init_kwargs, given["quantization_config"], frozen=True)
    args.model_init_kwargs = None  # of which the trainer would say that it does not use them
    return {"model": adapter.load_onto(base, trains=True), "peft_config": None, "quantization_config": None}


def _export(run: RunConfig, output_dir: Path) -> None:
    """What is made of the saved model after training."""
    model = output_dir
    if run.merge_adapter_with_base:
        from ..export import to_merged

        model = output_dir / MERGED
        to_merged(output_dir, model)
        print(f"Merged model saved to: {model}")
    if run.convert_to_gguf:
        print(f"GGUF file saved to: {to_gguf(model, output_dir / GGUF, outtype=run.gguf_quantization)}")
