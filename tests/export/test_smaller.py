"""Smaller models: without the silenced neurons, the same logits, in every architecture that has one width."""

import copy
import json

import pytest
import torch
from helpers import FAMILIES, VOCABULARY, logits, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fnsft_trl import FNSFTError, NeuronMask, find_neuron_sites, lesion
from fnsft_trl.data.embedded import embedded_model
from fnsft_trl.export import to_baked, to_smaller


IDS = torch.arange(3, 21).view(2, 9) % VOCABULARY
# How many of the 40 neurons of each layer are silenced: the widest layer keeps 37.
SILENCED = {0: 12, 1: 3, 2: 20}


def unequal(model, silenced=SILENCED) -> NeuronMask:
    """Random neurons, in every layer another number."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for site in find_neuron_sites(model):
        layers[site.layer] = torch.zeros(site.width, dtype=torch.bool)
        layers[site.layer][torch.randperm(site.width, generator=generator)[: silenced.get(site.layer, 0)]] = True
    return NeuronMask(layers)


def saved(model, directory):
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_computes_what_the_hooked_one_does(family, tmp_path):
    model = tiny_model(family)
    mask = unequal(model)
    saved(model, tmp_path / "model")
    removal = to_smaller(tmp_path / "model", tmp_path / "small", mask)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with lesion(model, mask):
        expected = logits(model, IDS)
    assert (logits(small, IDS) - expected).abs().max() < 1e-5
    assert (expected - logits(model, IDS)).abs().max() > 1e-2
    assert [site.width for site in find_neuron_sites(small)] == [37, 37, 37]
    assert removal.padded == {0: 9, 2: 17}
    assert (removal.before, removal.after) == (model.num_parameters(), small.num_parameters())
    assert removal.after < removal.before
    assert small.config.removed_neurons["neurons"] == mask.to_ranges()
    assert "widest layer's, 37, and 2 layers are padded with 26 neurons of zeros" in str(removal)
    assert " ".join(str(removal).split()) in (tmp_path / "small" / "README.md").read_text()


def test_layers_of_one_width_need_no_padding(tmp_path):
    model = tiny_model("llama")
    saved(model, tmp_path / "model")
    removal = to_smaller(tmp_path / "model", tmp_path / "small", unequal(model, {0: 4, 1: 4, 2: 4}))
    assert (removal.width, removal.padded) == (36, {})
    assert "padded" not in str(removal)


def test_a_width_equal_to_the_hidden_size_is_told_from_it(tmp_path):
    config = copy.deepcopy(tiny_model("llama").config)
    config.intermediate_size = config.hidden_size
    model = type(tiny_model("llama"))(config)
    saved(model, tmp_path / "model")
    removal = to_smaller(tmp_path / "model", tmp_path / "small", unequal(model, {0: 2, 1: 2, 2: 2}))
    assert removal.width == 14
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size == 16


def test_a_baked_lesion_is_removed_without_being_named_again(tmp_path):
    model = tiny_model("llama")
    mask = unequal(model)
    to_baked(saved(model, tmp_path / "model"), tmp_path / "baked", mask)
    assert to_smaller(tmp_path / "baked", tmp_path / "small").removed == mask
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "baked_lesion" not in written


@pytest.mark.slow
def test_a_baked_lesion_of_a_real_model_makes_it_smaller(tmp_path):
    """30% of SmolLM2's neurons, between 20% and 40% of each layer's; in float64, where nothing is left to rounding."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float64").eval()
    sites = find_neuron_sites(model)
    shares = [0.2 + 0.2 * number / (len(sites) - 1) for number in range(len(sites))]
    counts = {site.layer: round(share * site.width) for site, share in zip(sites, shares, strict=True)}
    mask = unequal(model, counts)
    with lesion(model, mask):
        expected = logits(model, IDS)
    to_baked(embedded_model(), tmp_path / "baked", mask)
    removal = to_smaller(tmp_path / "baked", tmp_path / "small")
    assert removal.removed == mask
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="float64").eval()
    assert (logits(small, IDS) - expected).abs().max() < 1e-9
    rounded = logits(small.float(), IDS) - expected
    assert rounded.abs().max() < 1e-4 * expected.abs().max()
    assert small.num_parameters() == removal.after < model.num_parameters()
    assert removal.width == max(site.width - counts[site.layer] for site in sites)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda model: unequal(model, {1: 40}), "all 40 neurons of layer 1"),
        (lambda model: unequal(model, {}), "has no neuron"),
        (lambda model: NeuronMask({0: torch.ones(16, dtype=torch.bool)}, "mlp_output"), "is of the site mlp_output"),
        (lambda model: NeuronMask({0: torch.ones(7, dtype=torch.bool)}), "made for another model"),
    ],
)
def test_what_cannot_be_removed_is_refused(mask, message, tmp_path):
    model = tiny_model("llama")
    saved(model, tmp_path / "model")
    with pytest.raises(FNSFTError, match=message):
        to_smaller(tmp_path / "model", tmp_path / "small", mask(model))
    assert not (tmp_path / "small").exists()
