"""What trains is what was selected, and everything else is bit-identical (invariants 3 and 4)."""

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model
from peft import LoraConfig

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, NeuronMask, find_neuron_sites


METHODS = ("neuron_delta", "lora", "full")


def train(family, method, template, rows, tokenizer, directory, *, args=None, **config):
    model = tiny_model(family)
    before = state(model)
    trainer = FNSFTTrainer(
        model=model,
        args=sft_config(directory, **(args or {})),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=0.1) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method, **config),
        network_template=template,
    )
    trainer.train()
    trained = trainer.model if method == "full" else trainer.model.merge_and_unload()
    return trainer, before, state(trained)


def changed_neurons(model, before, after, site) -> tuple[NeuronMask, set[str]]:
    """The neurons any of whose weights differ, and the changed parameters that hold no neuron."""
    changed = changed_entries(before, after)
    layers = {}
    for s in find_neuron_sites(model, kind=site):
        members = torch.zeros(s.width, dtype=torch.bool)
        for part in s.layout.slices:
            entries = changed.pop(part.full_name, None)
            if entries is not None:
                members[part.touched(entries)] = True
        layers[s.layer] = members
    return NeuronMask(layers, site), set(changed)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_selected_train_and_nothing_else(family, method, site, site_templates, rows, tokenizer, tmp_path):
    template = site_templates[site][family]
    trainer, before, after = train(
        family, method, template, rows, tokenizer, tmp_path, ica_component_ids=[0], ica_site=site
    )
    changed, others = changed_neurons(tiny_model(family), before, after, site)
    assert others == set()
    assert changed == trainer.trainable_neurons == trainer.neuron_mask
    assert 0 < changed.fraction < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_unselected_train_and_selected_stay(family, method, templates, rows, tokenizer, tmp_path):
    trainer, before, after = train(
        family, method, templates[family], rows, tokenizer, tmp_path, train_neurons="unselected"
    )
    changed, others = changed_neurons(tiny_model(family), before, after, "mlp_intermediate")
    assert changed == ~trainer.neuron_mask
    assert (others != set()) == (method == "full")


def test_train_other_false_trains_neurons_only(family, templates, rows, tokenizer, tmp_path):
    trainer, before, after = train(
        family, "full", templates[family], rows, tokenizer, tmp_path, train_neurons="unselected", train_other=False
    )
    changed, others = changed_neurons(tiny_model(family), before, after, "mlp_intermediate")
    assert changed == ~trainer.neuron_mask
    assert others == set()
