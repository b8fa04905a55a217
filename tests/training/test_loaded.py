"""What a config asks of a template that was loaded is applied, or refused; never dropped without a word."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, assert_only_these_changed, sft_config, state, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    NeuronMask,
    discover_networks,
    find_neuron_sites,
    select_neurons,
)
from fnsft_trl.config import ThresholdRule
from fnsft_trl.training.loaded import check_settings, chosen_layers


# Setting of a discovery -> values that it may have; together they are all of them.
VALUES = {
    "ica_components": st.integers(1, 9),
    "ica_variant": st.sampled_from(["temporal", "spatial"]),
    "ica_standardize": st.sampled_from(["center", "layer", "zscore"]),
    "ica_decomposition": st.sampled_from(["ica", "pca", "kmeans"]),
    "ica_surrogate": st.booleans(),
    "ica_contrast": st.sampled_from(["logcosh", "cube", "exp"]),
    "ica_backend": st.sampled_from(["torch", "sklearn"]),
    "ica_dtype": st.sampled_from(["auto", "float32", "float64"]),
    "ica_rank": st.integers(16, 200),
    "ica_max_tokens": st.integers(1, 10**6),
    "ica_until_reliable": st.none() | st.floats(0.1, 0.9),
    "ica_template_samples_per_ds": st.none() | st.integers(1, 99),
    "ica_reservoir": st.integers(1, 10**5),
    "ica_skip_tokens": st.integers(0, 3),
    "ica_skip_special": st.booleans(),
    "ica_drop_massive": st.none() | st.floats(2, 99),
    "ica_batch_size": st.integers(1, 9),
    "ica_max_length": st.integers(4, 999),
    "ica_seed": st.integers(0, 9),
    "ica_datasets": st.none() | st.lists(st.sampled_from(["a/x.jsonl", "b", "org/c"]), min_size=1, unique=True),
}
HEEDED = {"ica_layers"}  # of a discovery, and of a selection
DEFAULTS = {f.name: f.default for f in fields(FunctionalNetworkConfig)}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("fnsft_trl.training.loaded.logger.warning", lines.append)
    return lines


def test_every_setting_of_a_discovery_is_tried_here():
    assert {*VALUES, *HEEDED} == {*FunctionalNetworkConfig().discovery_settings(), "ica_datasets"}


@settings(max_examples=150)
@given(made=st.fixed_dictionaries({}, optional=VALUES), asked=st.fixed_dictionaries({}, optional=VALUES))
def test_a_setting_is_that_of_the_template_or_is_refused(templates, made, asked):
    """Given is what is not the default; a template made with that value takes it."""
    for values in (made, asked):  # what is of FastICA has no effect on the controls of it, and is refused there
        if values.get("ica_decomposition", "ica") != "ica":
            for name in ("ica_variant", "ica_contrast", "ica_backend"):
                values.pop(name, None)
    made = {"ica_components": 3, **made}
    template = templates["llama"].with_threshold(ThresholdRule())
    template.components = template.components * 3
    template.components = template.components[: made["ica_components"]]
    template.settings = FunctionalNetworkConfig(**made).discovery_settings()
    template.calibration = {**template.calibration, "sources": made.get("ica_datasets") or ["texts"]}
    made = {**DEFAULTS, **made}
    given_ = {name for name, value in asked.items() if value != DEFAULTS[name]}
    same = {name for name in given_ if asked[name] == made[name]}
    same |= {name for name in given_ & {"ica_dtype"} if {asked[name], made[name]} <= {"auto", "float32"}}
    same |= {name for name in given_ & {"ica_datasets"} if sorted(asked[name]) == sorted(made[name] or [])}
    config = FunctionalNetworkConfig(**asked)
    if given_ == same:
        assert check_settings(config, template) is template
    else:
        with pytest.raises(FNSFTError, match="the template was made with") as error:
            check_settings(config, template)
        name = str(error.value).partition(" ")[0]
        assert name in given_ - same
        if name not in ("ica_datasets", "ica_dtype"):
            assert f"is {asked[name]!r}, but the template was made with {made[name]!r}; drop {name}" in str(
                error.value
            )


def test_the_seed_of_a_random_selection_is_not_that_of_the_template(templates):
    def config(**more):
        return FunctionalNetworkConfig(ica_seed=7, ica_fraction=0.3, **more)

    check_settings(config(ica_select="random"), templates["llama"])
    with pytest.raises(FNSFTError, match="ica_seed is 7, but the template was made with 0"):
        check_settings(config(), templates["llama"])


def test_a_template_that_says_nothing_of_its_discovery_is_a_warning(said):
    file = ROOT / "tests" / "golden" / "templates" / "original-neurons.json"
    listed = FunctionalNetworkTemplate.from_pretrained(file)
    listed.loadings = {layer: torch.eye(2, 40) for layer in range(3)}
    check_settings(FunctionalNetworkConfig(ica_rank=20, ica_datasets="a", ica_components=2), listed)
    assert said == ["no effect with a template, which does not say what it was made with: ica_rank, ica_datasets"]
    with pytest.raises(FNSFTError, match="ica_components is 3, but the template was made with 2"):
        check_settings(FunctionalNetworkConfig(ica_components=3), listed)


def make(directory, rows, tokenizer, template, **config):
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(**config),
        network_template=template,
    )


LAYERS = {"0-1": {0, 1}, "2": {2}, "1:": {1, 2}, "0,2": {0, 2}, "all": {0, 1, 2}, "0-2": {0, 1, 2}}


@pytest.mark.parametrize("chosen", LAYERS)
@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"ica_fraction": 0.3},
        {"ica_select": "random", "ica_fraction": 0.3},
        {"ica_select": "activation", "ica_fraction": 0.2},
    ],
    ids=str,
)
def test_ica_layers_restricts_the_selection(templates, rows, tokenizer, tmp_path, chosen, selection):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], ica_layers=chosen, **selection)
    whole = make(tmp_path, rows, tokenizer, templates["llama"], **selection).neuron_mask
    assert set(trainer.neuron_mask.layers) == LAYERS[chosen]
    for layer, members in trainer.neuron_mask.layers.items():
        assert torch.equal(members, whole.layers[layer])
    assert set(trainer.network_template.loadings) == {0, 1, 2}


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({}, lambda selected: selected),
        ({"mask_mode": "preserve"}, lambda selected: selected),
        ({"mask_mode": "lesion"}, lambda selected: ~selected),  # with all neurons of other layers
    ],
    ids=["no mask", "preserve", "lesion"],
)
def test_what_is_masked_and_trained_lies_in_these_layers(templates, rows, tokenizer, tmp_path, config, trained):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], ica_layers="1", **config)
    members = templates["llama"]
    selected = NeuronMask({1: torch.stack([members.members(n)[1] for n in range(3)]).any(0)})
    assert trainer.neuron_mask == selected
    expected = trained(selected.over(dict.fromkeys(range(3), 40)))
    if trainer.mask_handle is not None:
        silenced = trainer.mask_handle.neurons
        assert silenced == (selected if config["mask_mode"] == "lesion" else ~selected)
    trainer.train()
    model = tiny_model("llama")
    after = state(trainer.model.merge_and_unload())
    assert_only_these_changed(state(model), after, find_neuron_sites(model), expected)
    trainer.create_model_card()
    assert ", in layers 1. The networks" in (tmp_path / "README.md").read_text()


def test_layers_that_the_template_does_not_cover_are_an_error(templates, model, rows, tokenizer):
    texts = [row["prompt"] + row["completion"] for row in rows]
    config = FunctionalNetworkConfig(
        ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32, ica_layers="0-1"
    )
    part = discover_networks(model, tokenizer, texts, config)
    assert chosen_layers(config, model, part) is None
    assert chosen_layers(FunctionalNetworkConfig(ica_layers=[1]), model, part) == [1]
    with pytest.raises(FNSFTError, match=r"ica_layers is 1:, but the template covers layers 0-1 and .* layer 2;"):
        chosen_layers(FunctionalNetworkConfig(ica_layers="1:"), model, part)
    with pytest.raises(FNSFTError, match="outside 0-2"):
        chosen_layers(FunctionalNetworkConfig(ica_layers="3"), model, part)
    with pytest.raises(FNSFTError, match="does not cover layer 2; it covers layers 0-1"):
        select_neurons(part, layers=[1, 2])
    with pytest.raises(FNSFTError, match=r"layer \(none was named\)"):
        select_neurons(part, layers=[])
