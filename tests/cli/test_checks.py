"""What would end a training at its beginning is refused before anything is loaded."""

import pytest
from datasets import Dataset
from helpers import sft_config, tiny_model

from fnsft_trl import FNSFTError, FNSFTTrainer
from fnsft_trl.cli.checks import _EVAL_METRICS, check_checkpoint, check_training_arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type=linear does not take: .*'foo'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs is not given, .* min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model is 'f1'.*one of: loss, "),
        ({"activation_offloading": True}, "there is none; drop it"),
    ],
    ids=str,
)
def test_what_would_end_the_training_is_refused(tmp_path, settings, message):
    with pytest.raises(FNSFTError, match=message):
        check_training_arguments(sft_config(tmp_path, **settings))


def test_liger_kernels_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("fnsft_trl.training.start.is_liger_kernel_available", lambda: False)
    with pytest.raises(FNSFTError, match="use_liger_kernel needs the package liger-kernel"):
        check_training_arguments(sft_config(tmp_path, use_liger_kernel=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 1},
        {"lr_scheduler_type": "constant", "max_steps": -1, "warmup_steps": 0.1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
        {"metric_for_best_model": "eval_mean_token_accuracy"},
    ],
    ids=str,
)
def test_what_a_training_takes_passes(tmp_path, settings):
    check_training_arguments(sft_config(tmp_path, **settings))


def test_the_metrics_are_those_that_an_evaluation_measures(tmp_path, rows, tokenizer):
    data = Dataset.from_list(rows[:4])
    trainer = FNSFTTrainer(
        tiny_model("llama"), sft_config(tmp_path), train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    measured = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch", "model_preparation_time"}
    assert measured == set(_EVAL_METRICS) - {"aux_loss"}


@pytest.mark.parametrize(
    ("files", "adapter", "message"),
    [
        (["trainer_state.json", "adapter_config.json"], False, "checkpoint of an adapter, and this run trains none"),
        (["trainer_state.json", "model.safetensors"], True, "checkpoint of a whole model, and this run trains an"),
    ],
    ids=str,
)
def test_a_training_goes_on_from_a_checkpoint_of_its_kind_only(tmp_path, files, adapter, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FNSFTError, match=message):
        check_checkpoint(tmp_path, adapter=adapter)


def test_checkpoints_of_both_kinds_pass(tmp_path):
    (tmp_path / "trainer_state.json").touch()
    check_checkpoint(tmp_path, adapter=True)  # of sharded weights, in a directory
    (tmp_path / "model.safetensors").touch()
    check_checkpoint(tmp_path, adapter=False)
    (tmp_path / "adapter_config.json").touch()  # beside the weights of another run
    check_checkpoint(tmp_path, adapter=True)
