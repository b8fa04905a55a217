"""The parts of TRL that have no public name are there, and do what is relied on."""

import inspect
import re

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fnsft_trl.compat import trl as compat


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return SFTTrainer(
        tiny_model("llama"),
        sft_config(tmp_path_factory.mktemp("run")),
        train_dataset=Dataset.from_list([{"prompt": "Say ba", "completion": "ko"}]),
        processing_class=tiny_tokenizer(),
    )


def test_trl_create_model_from_path_loads_what_a_config_names(model_dir):
    model = compat.create_model_from_path(str(model_dir), dtype="bfloat16", device_map=None)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert compat.create_model_from_path(str(model_dir)).dtype == torch.float32


def test_trl_preparation_settings_are_all_that_a_prepared_dataset_depends_on():
    source = inspect.getsource(SFTTrainer._prepare_dataset)
    read = set(re.findall(r"\bargs\.(\w+)", source))
    assert {"dataset_text_field", "max_length"} < read
    assert read <= {*compat.PREPARATION_SETTINGS, "seed", "dataset_num_proc"}
    assert set(compat.PREPARATION_SETTINGS) <= SFTConfig.__dataclass_fields__.keys()


def test_trl_preparation_reads_these_attributes_of_the_trainer():
    source = inspect.getsource(SFTTrainer._prepare_dataset)
    read = set(re.findall(r"\bself\.(\w+)", source))
    assert read <= {"_tokenizer", "_is_vlm", "completion_only_loss", "chat_template"}


@pytest.mark.parametrize(
    "name", ["completion_only_loss", "chat_template", "is_fsdp_enabled", "is_deepspeed_enabled", "hub_model_id"]
)
def test_trl_sft_trainer_has_the_attribute(trainer, name):
    assert name in vars(trainer)


def test_trl_sft_config_knows_its_process(trainer):
    args = trainer.args
    assert args.distributed_state.is_local_main_process is args.should_save is True
    assert args.distributed_state.distributed_type == "NO"


def test_trl_sft_trainer_lists_its_callbacks(trainer):
    assert trainer.callback_handler.callbacks


def test_trl_evaluation_metrics_are_what_the_next_log_shows(trainer):
    trainer.model.eval()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    metrics = compat.evaluation_metrics(trainer)
    assert "mean_token_accuracy" in metrics
    expected = sum(metrics["mean_token_accuracy"]) / len(metrics["mean_token_accuracy"])
    logs = {"other_loss": 1.0}
    trainer.log(logs)
    assert logs["eval_mean_token_accuracy"] == expected
    assert not compat.evaluation_metrics(trainer)
