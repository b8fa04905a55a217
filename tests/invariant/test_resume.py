"""Resume equals uninterrupted, bit for bit, in all three training ways (invariant 5)."""

import pytest
from datasets import Dataset
from helpers import FAMILIES, changed_entries, sft_config, state, tiny_model
from peft import LoraConfig

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig


CASES = [(family, {}) for family in FAMILIES]
CASES += [("llama", {"mask_mode": "lesion"}), ("llama", {"train_neurons": "unselected"})]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
@pytest.mark.parametrize(("family", "mask"), CASES, ids=str)
def test_resumed_run_equals_the_uninterrupted_one(templates, rows, tokenizer, tmp_path, method, family, mask):
    def make(directory, **changes):
        return FNSFTTrainer(
            model=tiny_model(family),
            args=sft_config(
                directory, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_dropout=0.1) if method == "lora" else None,
            network_config=FunctionalNetworkConfig(train_method=method, **mask, **changes),
            network_template=templates[family],
        )

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    if mask == {}:
        other = make(tmp_path / "other", ica_component_ids=[0])
        with pytest.raises(FNSFTError, match=r"trainable was \d+ neurons .* and is now"):
            other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    fresh = state(make(tmp_path / "fresh").model)
    assert changed_entries(fresh, state(whole.model))
