"""SiteBases: the directions of MLPs' inputs that a discovery keeps are those that are found alone."""

import pytest
import torch
from helpers import tiny_model, tiny_rows, tiny_tokenizer

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks
from fnsft_trl.data.sequences import token_sequences
from fnsft_trl.discovery.directions import InputSums, KeptDirections, KeptText
from fnsft_trl.discovery.module_directions import template_basis
from fnsft_trl.neurons.sites import find_neuron_sites


TEXTS = {
    "a": [row["prompt"] * 6 for row in tiny_rows(40)],
    "b": [row["completion"] * 4 for row in tiny_rows(12, seed=3)],
}
CONFIG = {"ica_components": 2, "ica_rank": 6, "ica_store_basis": 3, "ica_max_length": 32}


def test_they_are_those_of_the_same_texts_each_of_which_counts_alike():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = discover_networks(model, tokenizer, TEXTS, FunctionalNetworkConfig(**CONFIG))
    kept = template_basis(found, model)
    texts = {
        name: KeptText([s.ids for s in token_sequences(rows, tokenizer, max_length=32)])
        for name, rows in TEXTS.items()
    }
    modules = [name for site in find_neuron_sites(model) for name in (site.down_name, *site.up_names)]
    alone = KeptDirections.find(model, modules, texts, leading=3, title=None)
    for name in modules:
        cosines = torch.linalg.svdvals(kept.of(name).basis.T @ alone.of(name).basis)
        assert len(cosines) == 5
        assert cosines.min() > 1 - 1e-4
        first = [each.of(name).basis[:, 0] for each in (kept, alone)]
        assert abs(first[0] @ first[1]) > 1 - 1e-5


def test_an_interrupted_discovery_goes_on_to_the_same(tmp_path, monkeypatch):
    from fnsft_trl.discovery import progress

    monkeypatch.setattr(progress, "_LEAST_SAVED", 1)
    model, tokenizer, config = tiny_model("llama"), tiny_tokenizer(), FunctionalNetworkConfig(**CONFIG)
    whole = discover_networks(model, tokenizer, TEXTS, config)
    calls = []

    class Broken(Exception):
        pass

    def stop(module, args):
        calls.append(1)
        if len(calls) > 12:
            raise Broken

    handle = model.model.layers[0].register_forward_pre_hook(stop)
    limited = FunctionalNetworkConfig(**CONFIG, ica_max_tokens=2000)
    with pytest.raises(Broken):
        discover_networks(model, tokenizer, TEXTS, limited, progress_dir=tmp_path)
    handle.remove()
    resumed = discover_networks(model, tokenizer, TEXTS, limited, progress_dir=tmp_path, resume=True)
    straight = discover_networks(model, tokenizer, TEXTS, limited)
    for layer, of in straight.basis.items():
        for side, rows in of.items():
            assert torch.equal(resumed.basis[layer][side], rows)
            assert rows.shape == whole.basis[layer][side].shape


@pytest.mark.parametrize("width", [12, 2100])  # a whole second moment, and a sketch
def test_parts_of_a_text_come_together(width):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 4, generator=draw) @ torch.randn(4, width, generator=draw) + 0.5
    whole, *parts = (InputSums(width, 4) for _ in range(3))
    whole.add(tokens[:8], tokens[8:], 1 / 8, 1 / 56)
    for part, first, others in zip(parts, (tokens[:4], tokens[4:8]), (tokens[8:40], tokens[40:]), strict=True):
        part.add(first, others, 1.0, 1.0)
    again = InputSums(width, 4)
    again.begin("cpu")
    again.load_state_dict(parts[1].state_dict())
    found = InputSums.merged([[parts[0], again]]).directions(("x",))[0]
    expected = whole.directions(("x",))[0]
    spanned = torch.linalg.svdvals(found[:, :5].T @ expected[:, :5])  # what four sources and a mean span
    assert spanned.min() > 1 - 1e-4


def test_experts_are_refused():
    from helpers import medium_experts

    with pytest.raises(FNSFTError, match="ica_store_basis finds directions of inputs that all tokens have"):
        discover_networks(medium_experts(), tiny_tokenizer(), TEXTS, FunctionalNetworkConfig(**CONFIG))
