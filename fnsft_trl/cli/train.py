"""fnsft train: TRL's SFT with a FunctionalNetworkConfig. Also `python -m fnsft_trl.cli.train` under accelerate."""

import os
import sys
from pathlib import Path

from ..data.config import DataConfig
from ..errors import FNSFTError
from . import run_verb
from .arguments import check_writable
from .options.help import format_help
from .options.parse import parse_options
from .options.run_config import RunConfig
from .options.translate import DEVICE_DTYPE
from .refusals import refusals


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(format_help())
        return
    options = parse_options(argv)
    run, network_config = RunConfig(**options.of(RunConfig)), options.network_config
    data_config = DataConfig(**options.of(DataConfig))
    if run.wandb_project:
        os.environ["WANDB_PROJECT"] = run.wandb_project

    from datasets import disable_caching
    from transformers import AutoConfig, AutoProcessor
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        get_peft_config,
        get_quantization_config,
    )

    from ..data.training import load_training_data
    from ..embedded import resolve_model
    from ..trainer import FNSFTTrainer
    from .checks import check_checkpoint, check_training_arguments
    from .logs import hush_repetitions
    from .models import check_attention, default_lora_targets, model_errors
    from .precision import Precision, check_quantization
    from .templates import save_template

    logger = logging.get_logger("fnsft_trl")
    given = options.values
    precision = Precision.choose(use_cpu=given.get("use_cpu"), bf16=given.get("bf16"), fp16=given.get("fp16"))
    for name in ("load_in_4bit", "load_in_8bit"):
        if given.get(name):
            check_quantization(name, precision.device)
    model_settings = options.of(ModelConfig)
    if model_settings.get("dtype") == DEVICE_DTYPE:
        model_settings["dtype"] = precision.dtype(frozen=options.has_adapter)
    with refusals():
        training_args = SFTConfig(**options.of(SFTConfig) | precision.training_arguments)
        script_args = ScriptArguments(**options.of(ScriptArguments))
        mixture = DatasetMixtureConfig(**options.of(DatasetMixtureConfig))
        model_args = ModelConfig(**model_settings)
        peft_config, quantization_config = get_peft_config(model_args), get_quantization_config(model_args)
    hush_repetitions(training_args.process_index)
    check_training_arguments(training_args, precision.device)
    check_attention(model_args.attn_implementation)
    output_dir = check_writable(training_args.output_dir)
    resume = training_args.resume_from_checkpoint
    if str(resume).lower() == "true":
        resume = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if resume is None:
            raise FNSFTError(f"there is no checkpoint in {output_dir} to resume from; drop resume_from_checkpoint")
    if resume:
        check_checkpoint(Path(resume), adapter=options.has_adapter)

    name = resolve_model(model_args.model_name_or_path)
    with model_errors(model_args.model_name_or_path):
        source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
        model_config = AutoConfig.from_pretrained(name, **source)
        processing_class = AutoProcessor.from_pretrained(name, **source)
    if not data_config.tokenized_cache:
        disable_caching()  # of TRL's own steps too
    data = load_training_data(script_args, training_args, mixture, data_config, processing_class)
    if peft_config is not None and network_config is None and peft_config.target_modules is None:
        peft_config.target_modules = default_lora_targets(model_config)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if training_args.process_index == 0:
        for note in options.notes:
            print(f"fnsft train: note: {note}", file=sys.stderr)
    logger.warning(
        f"device: {precision.device}; mixed precision: {precision.mixed}; weights held in {model_args.dtype}"
    )
    if network_config is None:
        logger.warning("no functional networks were asked for: this is plain supervised fine-tuning")
    with refusals():
        trainer = FNSFTTrainer(
            model=name,
            args=training_args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=data.processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            network_config=network_config,
            tokenized_cache=data_config.tokenized_cache,
        )
        trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # whose package may be missing
    if trainer.network_config is not None:
        logger.warning(
            f"selected {trainer.neuron_mask}; trainable: {trainer.trainable_neurons.count} neurons, method "
            f"{trainer.plan.method}, mask {trainer.plan.mask_mode or 'off'}"
        )
    if run.ica_template_output and trainer.is_world_process_zero():
        save_template(trainer.network_template, run.ica_template_output)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        _export(run, output_dir)
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        message = {"commit_message": run.hub_commit_message} if run.hub_commit_message else {}
        trainer.push_to_hub(dataset_name=script_args.dataset_name, **message)
    trainer.accelerator.print(f"Model saved to: {training_args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that ends in a group it has not left can abort


def _export(run: RunConfig, output_dir: Path) -> None:
    """What is made of the saved model after training."""
    model = output_dir
    if run.merge_adapter_with_base:
        from ..export import to_merged

        model = output_dir / "merged"
        to_merged(output_dir, model)
        print(f"Merged model saved to: {model}")
    if run.convert_to_gguf:
        from ..gguf import to_gguf

        print(f"GGUF file saved to: {to_gguf(model, output_dir / 'model.gguf', outtype=run.gguf_quantization)}")


if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
