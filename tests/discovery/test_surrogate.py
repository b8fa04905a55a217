"""Surrogates: every neuron does what it did, and no two do anything together."""

import pytest
import torch
from helpers import tiny_model
from test_decomposition import planted

from fnsft_trl import FunctionalNetworkConfig, discover_networks
from fnsft_trl.discovery.surrogate import shifted_in_time


def test_each_neuron_keeps_its_values_in_their_order_and_loses_its_partners():
    data, loadings = planted(tokens=500)
    moved = shifted_in_time(data, seed=3)
    for neuron in range(0, 200, 17):
        shift = int((data[:, neuron] == moved[0, neuron]).nonzero()[0])
        assert torch.equal(moved[:, neuron], data[:, neuron].roll(-shift))
    group = (loadings[0] != 0).nonzero().flatten()
    before, after = (torch.corrcoef(values[:, group].T).abs() for values in (data, moved))
    off = ~torch.eye(len(group), dtype=torch.bool)
    assert before[off].mean() > 0.8
    assert after[off].mean() < 0.1
    assert torch.equal(moved, shifted_in_time(data, seed=3))
    assert not torch.equal(moved, shifted_in_time(data, seed=4))


def test_a_surrogate_template_has_the_moments_and_says_what_it_is(tokenizer, rows):
    texts = [row["prompt"] + row["completion"] for row in rows]
    small = {"ica_components": 3, "ica_rank": 16, "ica_max_tokens": 250, "ica_batch_size": 4, "ica_max_length": 32}
    plain, shifted, again = (
        discover_networks(tiny_model("llama"), tokenizer, texts, FunctionalNetworkConfig(**small, ica_surrogate=on))
        for on in (False, True, True)
    )
    for layer in plain.rms:
        torch.testing.assert_close(shifted.rms[layer], plain.rms[layer])
        torch.testing.assert_close(shifted.mean[layer], plain.mean[layer], rtol=1e-4, atol=1e-6)
        assert torch.equal(shifted.loadings[layer], again.loadings[layer])
        assert not torch.equal(shifted.loadings[layer], plain.loadings[layer])
    assert shifted.settings["ica_surrogate"] is True


@pytest.mark.parametrize("on", [False, True])
def test_of_networks_that_are_none_it_is_not_said_that_they_may_not_replicate(on, tokenizer, rows, log, monkeypatch):
    monkeypatch.setattr("fnsft_trl.discovery.decomposition.TOLERANCE", 0)
    texts = [row["prompt"] + row["completion"] for row in rows]
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_length=32, ica_surrogate=on)
    discover_networks(tiny_model("llama"), tokenizer, texts, config)
    assert ("did not reach its tolerance" in log.text) is not on
