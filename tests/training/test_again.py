"""A trainer that trains again: after a training, after Ctrl-C, and with smaller batches. What was frozen stays so."""

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, state, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, find_neuron_sites
from fnsft_trl.export import changed_neurons


class BreaksOff(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def again(trainer, way):
    if way == "auto_find_batch_size":
        step, calls = trainer.training_step, []

        def without_room(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return step(*args, **kwargs)

        trainer.training_step = without_room
    elif way == "after Ctrl-C":
        trainer.add_callback(BreaksOff)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(BreaksOff)
    else:
        trainer.train()
    trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["twice", "after Ctrl-C", "auto_find_batch_size"])
@pytest.mark.parametrize("method", ["lora", "full", "neuron_delta"])
def test_a_trainer_trains_again(templates, rows, tokenizer, tmp_path, method, way):
    model = tiny_model("llama")
    before, sites = state(model), find_neuron_sites(model)
    options = {"auto_find_batch_size": True} if way == "auto_find_batch_size" else {}
    trainer = FNSFTTrainer(
        model=model,
        args=sft_config(tmp_path, max_steps=3, learning_rate=0.05, weight_decay=0.3, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method, ica_component_ids=[0]),
        network_template=templates["llama"],
    )
    again(trainer, way)
    assert trainer.state.global_step == 3
    after = trainer.model if method == "full" else trainer.model.merge_and_unload()
    changed, others = changed_neurons(sites, before, state(after))
    assert changed == trainer.trainable_neurons
    assert not others
    assert all(torch.isfinite(value).all() for value in state(after).values())
