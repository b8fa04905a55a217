"""Full fine-tuning held to a mask under every optimizer of TrainingArguments that is installed."""

from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, assert_only_these_changed, medium_model, sft_config, state
from transformers.training_args import OptimizerNames

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, find_neuron_sites
from fnsft_trl.constraints.full import REFUSED_OPTIMIZERS
from fnsft_trl.training.start import check_start


# Optimizer -> the package that it needs.
NEEDS = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "galore_adamw": "galore_torch",
    "galore_adamw_8bit": "galore_torch",
    "galore_adafactor": "galore_torch",
    "grokadamw": "grokadamw",
    "apollo_adamw": "apollo_torch",
    "stable_adamw": "torch_optimi",
}
BITSANDBYTES = ("bnb", "8bit", "paged", "lion", "ademamix")
NAMES = [name.value for name in OptimizerNames]
REFUSED = {name: why for name in NAMES for part, why in REFUSED_OPTIMIZERS.items() if part in name}
QUICK = ("adamw_torch", "sgd", "adafactor", "adamw_8bit", "lion_32bit", "rmsprop")
EXACT = [name for name in NAMES if name not in REFUSED and name not in NEEDS]


def table() -> str:
    rows = ["| `optim` | full fine-tuning |", "|---|---|"]
    for name in NAMES:
        outcome = f"refused: it {REFUSED[name]}" if name in REFUSED else "exact"
        if name in NEEDS:
            outcome = f"not tested: needs {NEEDS[name]}"
        rows.append(f"| `{name}` | {outcome} |")
    return "\n".join(rows)


def test_the_table_in_the_docs_is_this_one():
    assert table() in (ROOT / "docs" / "combinations.md").read_text()


def make(directory, rows, tokenizer, template, optim, **args):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1}
    return FNSFTTrainer(
        model=medium_model(),
        args=sft_config(directory, optim=optim, **{**settings, **args}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(train_method="full", ica_select="random", ica_fraction=0.5),
        network_template=template,
    )


CELLS = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXACT]


@pytest.mark.parametrize("optim", CELLS)
def test_frozen_neurons_are_bit_identical_and_the_others_change(medium_template, rows, tokenizer, tmp_path, optim):
    """With weight decay, clipping and accumulation on."""
    if any(part in optim for part in BITSANDBYTES):
        pytest.importorskip("bitsandbytes")
    trainer = make(tmp_path, rows, tokenizer, medium_template, optim)
    before = state(trainer.model)
    trainer.train()
    sites = find_neuron_sites(trainer.model)
    assert_only_these_changed(before, state(trainer.model), sites, trainer.neuron_mask)
    optimizer_state = trainer.optimizer.state[trainer.model.model.layers[0].mlp.up_proj.weight]
    assert ("8bit" in optim) == any(v.dtype == torch.uint8 for v in optimizer_state.values() if torch.is_tensor(v))


@pytest.mark.parametrize("optim", CELLS)
def test_without_putting_values_back_the_same_check_fails(medium_template, rows, tokenizer, tmp_path, optim):
    if any(part in optim for part in BITSANDBYTES):
        pytest.importorskip("bitsandbytes")
    trainer = make(tmp_path, rows, tokenizer, medium_template, optim)
    trainer.callback_handler.callbacks = []
    before = state(trainer.model)
    trainer._run.way.frozen.slices.clear()
    trainer.train()
    sites = find_neuron_sites(trainer.model)
    with pytest.raises(AssertionError):
        assert_only_these_changed(before, state(trainer.model), sites, trainer.neuron_mask)


@pytest.mark.parametrize("optim", REFUSED)
def test_refused_by_name_with_the_reason(medium_template, rows, tokenizer, tmp_path, optim):
    with pytest.raises(FNSFTError, match=f"optim={optim} {REFUSED[optim]}"):
        make(tmp_path, rows, tokenizer, medium_template, optim)


@pytest.mark.parametrize("optim", NEEDS)
def test_what_is_not_installed_is_refused_before_anything_is_loaded(tmp_path, optim):
    if find_spec(NEEDS[optim]):
        pytest.skip(f"{NEEDS[optim]} is installed")
    with pytest.raises(FNSFTError, match=f"optim={optim} cannot be used: "):
        check_start(sft_config(tmp_path, optim=optim, optim_target_modules=["mlp"]), {})
