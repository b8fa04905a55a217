import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback

from fnsft_trl import FNSFTError, FNSFTTrainer, FrozenNeuronGuard, FunctionalNetworkConfig, select_neurons
from fnsft_trl.training.guard import FrozenNeuronMoved, _row_checksums


class Vandal(TrainerCallback):
    """Moves one entry of one weight in the middle of training."""

    def __init__(self, parameter, index):
        self.parameter, self.index = parameter, index

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            flipped = self.parameter[self.index].view(torch.int32) ^ 1  # the smallest change there is
            self.parameter[self.index] = flipped.view(torch.float32)


def make(directory, rows, tokenizer, template, method="full", **args):
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory, **args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method),
        network_template=template,
    )


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_guard_names_the_module_and_the_neuron_that_moved(templates, rows, tokenizer, tmp_path, method):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], method, weight_decay=0.0)
    if method == "full":
        trainer._run.way.frozen.slices.clear()  # or it would put the entry back after the step
    neuron = int((~trainer.neuron_mask).indices(1)[3])
    module = trainer.model.get_submodule(
        ("" if method == "full" else "base_model.model.") + "model.layers.1.mlp.down_proj"
    )
    trainer.add_callback(Vandal(module.weight, (5, neuron)))
    with pytest.raises(FrozenNeuronMoved) as error:
        trainer.train()
    assert "layers.1.mlp.down_proj" in str(error.value)
    assert f"neuron {neuron};" in str(error.value)


def test_guard_watches_the_frozen_slices_of_lora_factors(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], "lora")
    trainer._run.way.frozen.slices.clear()  # or it would put the entry back after the step
    neuron = int((~trainer.neuron_mask).indices(2)[0])
    module = trainer.model.get_submodule("base_model.model.model.layers.2.mlp.up_proj")
    trainer.add_callback(Vandal(module.lora_B["default"].weight, (neuron, 1)))
    with pytest.raises(FrozenNeuronMoved, match=rf"up_proj\.lora_B\.default .*neuron {neuron};"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 33])
def test_a_checksum_shows_every_flipped_bit(dtype, width):
    storage = torch.randint(-100, 100, (5 * width + 1,), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = storage[1:].view(5, width)  # not aligned to words of 64 bits
    sums = _row_checksums(rows)
    assert torch.equal(_row_checksums(rows.clone()), sums)
    for entry in range(width):
        changed = rows.clone()
        changed.view(torch.uint8).view(5, width, -1)[2, entry, 0] ^= 1
        assert (_row_checksums(changed) != sums).tolist() == [False, False, True, False, False]


def test_guard_stops_at_the_first_save_after_the_damage(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], "neuron_delta", save_strategy="steps", save_steps=1)
    trainer.add_callback(Vandal(trainer.model.get_input_embeddings().weight, (7, 0)))
    with pytest.raises(FrozenNeuronMoved, match=r"embed_tokens.*by step 2"):
        trainer.train()


def test_guard_is_silent_when_nothing_moved(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"])
    guards = [c for c in trainer.callback_handler.callbacks if isinstance(c, FrozenNeuronGuard)]
    assert len(guards) == 1
    trainer.train()
    guards[0].check(step=99)


def test_guard_says_that_no_training_has_begun(templates):
    guard = FrozenNeuronGuard(tiny_model("llama"), select_neurons(templates["llama"], component_ids=[0]))
    with pytest.raises(FNSFTError, match="none has begun"):
        guard.check(step=0)
