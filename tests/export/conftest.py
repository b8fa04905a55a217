"""What runs of every way to train have written, for the tests of exports."""

import pytest
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_tokenizer
from peft import LoraConfig

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig
from fnsft_trl.export import to_baked


WAYS = {
    "neuron_delta": {"train_neurons": "unselected"},
    "lora": {"train_neurons": "unselected"},
    "full": {"train_neurons": "unselected", "train_other": False},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, templates):
    """A folder with a base model and, under the name of the way, what a run with a lesion has written."""
    root = tmp_path_factory.mktemp("trained")
    tiny_model("llama").save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    rows = [{"prompt": f"Say {word}:", "completion": f" {word}."} for word in ("ba", "ko", "ri", "ten")]
    for way, settings in WAYS.items():
        trainer = FNSFTTrainer(
            str(root / "base"),
            sft_config(root / way, max_steps=2),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["up_proj", "down_proj"]) if way == "lora" else None,
            network_config=FunctionalNetworkConfig(
                train_method=way, mask_mode="lesion", ica_component_ids=[0], ica_percentile=80, **settings
            ),
            network_template=templates["llama"],
        )
        trainer.train()
        trainer.save_model()
    to_baked(root / "full", root / "baked")
    return root
