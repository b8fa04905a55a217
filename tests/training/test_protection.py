"""Protection while training: D U = 0 for every way of training, whatever else the run does."""

import copy
import json

import pytest
from datasets import Dataset
from helpers import sft_config, state, tiny_model, tiny_rows, tiny_tokenizer
from peft import LoraConfig, PeftModel

from fnsft_trl import (
    FNSFTTrainer,
    FunctionalNetworkConfig,
    ProtectionConfig,
)
from fnsft_trl.discovery.saved_directions import load_directions
from fnsft_trl.neurons.sites import linear_shape
from fnsft_trl.training.protection import PROTECTION_DIR


ROWS = Dataset.from_list(tiny_rows())
EXACT = 1e-6  # ||D U|| / ||D|| in float32
MERGED = 2.0**-23  # ||(W' - W) U|| / ||W|| after a merge in float32
NETWORKS = {"ica_components": 3, "ica_rank": 8, "ica_fraction": 0.4, "train_neurons": "selected"}
EVERYWHERE = ["q_proj", "up_proj", "down_proj"]
# way -> (arguments of the trainer, whether it trains networks)
WAYS = {
    "full": {},
    "full, some neurons": {"network_config": {**NETWORKS, "train_method": "full"}},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=EVERYWHERE)},
    "lora, some neurons": {"peft_config": LoraConfig(r=4), "network_config": NETWORKS},
    "deltas": {"network_config": {**NETWORKS, "train_method": "neuron_delta"}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "kept.txt"
    path.write_text("\n".join(row["completion"] * 12 for row in tiny_rows(60, seed=5)))
    return str(path)


def protection(text, **changes):
    return ProtectionConfig(
        **{"protect": "subspace", "protect_datasets": [f"kept={text}"], "protect_dims": 4, "protect_tokens": 256}
        | changes
    )


def trainer_of(way, directory, protection, model=None, **changes):
    arguments = copy.deepcopy(WAYS[way])
    if "network_config" in arguments:
        arguments["network_config"] = FunctionalNetworkConfig(**arguments["network_config"])
    return FNSFTTrainer(
        model=tiny_model("llama") if model is None else model,
        args=sft_config(directory, **changes),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        protection=protection,
        **arguments,
    )


def whole_change(before, model):
    """Name of a linear module -> (W' - W, W), of the merged model."""
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    found = {}
    for name, module in model.named_modules():
        if linear_shape(module) is not None and f"{name}.weight" in before:
            base = before[f"{name}.weight"].double()
            found[name] = (module.weight.detach().double() - base, base)
    return found


def left_of(before, model, kept):
    """The largest ||(W' - W) U|| / ||W|| after a merge, over modules that changed, and how many did."""
    found = []
    for name, (change, base) in whole_change(before, model).items():
        if change.any():
            found.append(float((change @ kept.of(name).basis).norm() / base.norm()))
    return max(found), len(found)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_change_lies_along_the_directions(way, text, tmp_path):
    model = tiny_model("llama")
    before = state(model)
    trainer = trainer_of(way, tmp_path, protection(text), model, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    assert trainer.protection.left() <= (MERGED if way.startswith("full") else EXACT)
    trainer.save_model()
    kept, _ = load_directions(tmp_path / PROTECTION_DIR)
    left, changed = left_of(before, trainer.model, kept)
    assert left <= MERGED
    assert changed >= (6 if way == "deltas" else 9) - 3
    assert (tmp_path / "results.json").is_file()
    told = json.loads((tmp_path / "results.json").read_text())["protection"]
    assert 0 < told["energy"]["kept"] <= 1
    assert 0 < told["task_energy"] <= 1
