"""Neurons that a LoRA adapter reaches are those that it can change, whatever its targets."""

import json

import pytest
import torch
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import sft_config, state
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, NeuronMask, discover_networks, find_neuron_sites
from fnsft_trl.constraints import reached_neurons
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.sites import SITES


LORA = [a for a in ARCHITECTURES if a.name not in ("BertForMaskedLM",)]
NAMED = {str(architecture): architecture for architecture in ARCHITECTURES}


@st.composite
def adapters(draw):
    """A model, a site, and LoRA on some of its modules and of its experts' weights, in some of its layers."""
    architecture = draw(st.sampled_from(LORA))
    kind = draw(st.sampled_from(SITES))
    model = architecture.model()
    sites = find_neuron_sites(model, kind=kind)
    slices = [part for site in sites for part in site.layout.slices if not part.parameter.endswith("bias")]
    bare = {part.full_name for part in slices if not part.full_name.endswith(".weight")}
    linear = {part.module_name for part in slices if part.full_name not in bare}
    linear |= {name for name, module in model.named_modules() if type(module) is torch.nn.Linear and "attn" in name}
    options = {}
    if linear:
        options["target_modules"] = draw(st.lists(st.sampled_from(sorted(linear)), max_size=4, unique=True))
    if bare:
        options["target_parameters"] = draw(st.lists(st.sampled_from(sorted(bare)), max_size=3, unique=True))
    if not any(options.values()):
        options = {"target_modules": sorted(linear)[:1]} if linear else {"target_parameters": sorted(bare)[:1]}
    return model, sites, kind, LoraConfig(r=2, **options)


@settings(max_examples=60)
@given(adapters(), st.integers(0, 5))
def test_the_neurons_reached_are_those_that_can_change(adapter, seed):
    model, sites, kind, config = adapter
    before = state(model)
    generator = torch.Generator().manual_seed(seed)
    asked = NeuronMask({s.layer: torch.rand(s.width, generator=generator) < 0.5 for s in sites}, kind)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    reached = reached_neurons(wrapped, asked, ["default"])
    changed, _ = changed_neurons(sites, before, state(wrapped.merge_and_unload()))
    assert reached == asked & changed


TRAINED = {
    "some layers": (
        "LlamaForCausalLM",
        {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]},
        True,
    ),
    "an excluded layer": (
        "LlamaForCausalLM",
        {"target_modules": ["up_proj"], "exclude_modules": ".*layers.0.*"},
        True,
    ),
    "one of three projections": ("LlamaForCausalLM", {"target_modules": ["q_proj", "down_proj"]}, False),
    "no targets named": ("LlamaForCausalLM", {}, False),
    "shared expert": ("Qwen2MoeForCausalLM", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, True),
    "one layer's experts": (
        "MixtralForCausalLM",
        {"target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.down_proj"]},
        True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["selected", "all"])
@pytest.mark.parametrize("case", TRAINED)
def test_a_run_names_as_trainable_what_can_change(case, train, rows, tokenizer, tmp_path, caplog):
    name, options, misses = TRAINED[case]
    base = NAMED[name].model()
    texts = [row["prompt"] + row["completion"] for row in rows]
    quick = {"ica_components": 3, "ica_rank": 16, "ica_max_tokens": 250, "ica_max_length": 32, "ica_percentile": 60}
    networks = {"train_neurons": train, "mask_mode": "lesion"} if train == "all" else {}
    trainer = FNSFTTrainer(
        base,
        sft_config(tmp_path, max_steps=4, learning_rate=0.1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, init_lora_weights="gaussian", **options),
        network_config=FunctionalNetworkConfig(**networks),
        network_template=discover_networks(base, tokenizer, texts, FunctionalNetworkConfig(**quick)),
    )
    named = trainer.trainable_neurons
    assert ("have no weight among the LoRA targets and stay as they are" in caplog.text) == misses
    trainer.train()
    trainer.save_model()
    written = json.loads((tmp_path / "functional_networks" / "selection.json").read_text())
    assert written["trainable"] == {"count": named.count, "sha256": named.sha256}
    card = (tmp_path / "README.md").read_text()
    assert f"{named.count} neurons (" in card or ("every neuron could change" in card and named.fraction == 1)
    changed, _ = changed_neurons(
        find_neuron_sites(NAMED[name].model()), state(NAMED[name].model()), state(trainer.model.merge_and_unload())
    )
    silenced = trainer.neuron_mask if train == "all" else ~(named | ~named)  # they get a gradient from others alone
    assert (changed & ~named).count == 0
    assert (named & ~changed & ~silenced).count == 0
