"""Without a network config FNSFTTrainer is SFTTrainer (invariant 1)."""

from pathlib import Path

import pytest
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model
from peft import LoraConfig
from trl import SFTTrainer

from fnsft_trl import FNSFTTrainer


@pytest.mark.slow
@pytest.mark.parametrize("with_lora", [False, True])
def test_without_a_network_config_it_is_sfttrainer_bit_for_bit(family, rows, tokenizer, tmp_path, with_lora):
    runs = []
    for trainer_class in (SFTTrainer, FNSFTTrainer):
        trainer = trainer_class(
            model=tiny_model(family),
            args=sft_config(tmp_path / trainer_class.__name__, gradient_checkpointing=True, save_strategy="steps"),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:8]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear") if with_lora else None,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
        files = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
        runs.append((losses, state(trainer.model), files, sorted(path.name for path in checkpoint.iterdir())))
    (losses, weights, files, names), (our_losses, our_weights, our_files, our_names) = runs
    assert losses == our_losses
    assert changed_entries(weights, our_weights) == {}
    assert files
    assert files == our_files
    assert names == our_names


def test_a_model_given_by_name_is_the_same_too(model_dir, rows, tmp_path):
    weights = []
    for trainer_class in (SFTTrainer, FNSFTTrainer):
        arguments = (str(model_dir), sft_config(tmp_path / trainer_class.__name__), None, Dataset.from_list(rows))
        trainer = trainer_class(*arguments)
        trainer.train()
        weights.append(state(trainer.model))
    assert changed_entries(*weights) == {}
