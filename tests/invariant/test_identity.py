"""Without a network config FNSFTTrainer is SFTTrainer (invariant 1)."""

from pathlib import Path

import pytest
from datasets import Dataset
from helpers import changed_entries, sft_config, state
from peft import LoraConfig
from trl import SFTTrainer

from fnsft_trl import FNSFTTrainer


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")])
def test_without_a_network_config_it_is_sfttrainer_bit_for_bit(model_dir, rows, tmp_path, peft_config):
    runs = []
    for trainer_class in (SFTTrainer, FNSFTTrainer):
        trainer = trainer_class(
            model=str(model_dir),
            args=sft_config(tmp_path / trainer_class.__name__, gradient_checkpointing=True, save_strategy="steps"),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:8]),
            peft_config=peft_config,
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
