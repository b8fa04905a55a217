from dataclasses import replace

import pytest
import torch

from fnsft_trl import FNSFTError, select_neurons
from fnsft_trl.config import ThresholdRule


def test_networks_are_the_union_of_their_members(templates):
    template = templates["llama"]
    both = select_neurons(template, [0, 2])
    assert both == select_neurons(template, [0]) | select_neurons(template, [2])
    assert select_neurons(template) == both | select_neurons(template, [1])


def test_fraction_takes_the_highest_or_lowest_of_every_layer(templates):
    template = templates["llama"]
    high = select_neurons(template, [0, 1], fraction=0.1)
    low = select_neurons(template, [0, 1], fraction=0.1, rank="lowest")
    for layer, loadings in template.loadings.items():
        scores = loadings[[0, 1]].abs().amax(0)
        assert high.layers[layer].sum() == low.layers[layer].sum() == 4
        assert scores[high.layers[layer]].min() >= scores[~high.layers[layer]].max()
        assert scores[low.layers[layer]].max() <= scores[~low.layers[layer]].min()


def test_pooled_fraction_ranks_over_all_layers(templates):
    template = templates["llama"]
    pooled = select_neurons(template, fraction=0.1, per_layer=False)
    assert pooled.count == 12
    scores = torch.cat([values.abs().amax(0) for values in template.loadings.values()])
    members = torch.cat(list(pooled.layers.values()))
    assert scores[members].min() >= scores[~members].max()


def test_controls_match_the_number_in_every_layer(templates):
    template = templates["llama"]
    networks = select_neurons(template, [0])
    for selector in ("random", "activation"):
        control = select_neurons(template, selector=selector, like=networks)
        assert {i: int(m.sum()) for i, m in control.layers.items()} == {
            i: int(m.sum()) for i, m in networks.layers.items()
        }
        assert control != networks


def test_activation_ranks_by_rms(templates):
    template = templates["llama"]
    loud = select_neurons(template, selector="activation", fraction=0.25)
    quiet = select_neurons(template, selector="activation", fraction=0.25, rank="lowest")
    assert (loud & quiet).count == 0
    for layer, rms in template.rms.items():
        assert rms[loud.layers[layer]].min() >= rms[~loud.layers[layer]].max()
        assert rms[quiet.layers[layer]].max() <= rms[~quiet.layers[layer]].min()


def test_random_follows_its_seed(templates):
    one, same, other = (
        select_neurons(templates["llama"], selector="random", fraction=0.3, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other


def test_an_unknown_network_lists_those_there_are(templates):
    with pytest.raises(FNSFTError, match=r"no network 3, 7; it has the networks 0-2"):
        select_neurons(templates["llama"], [0, 3, 7])


def with_reliability(template, values, null):
    components = [replace(c, reliability=value) for c, value in zip(template.components, values, strict=True)]
    return replace(template, components=components, null=null)


NULLS = [
    {"reliability": 0.1, "jaccard": 0.1, "highest": 0.2},
    {"reliability": 0.8, "jaccard": 0.1, "highest": 0.88},
    {"reliability": 0.88, "jaccard": 0.1},  # as an older version measured it
    {"reliability": 0.9, "jaccard": 0.1, "highest": 1.0},
]


@pytest.mark.parametrize("null", NULLS, ids=str)
@pytest.mark.parametrize("least", [0.01, 0.3, 0.8, 1.0])
def test_networks_are_left_out_by_their_reliability_above_null(templates, null, least):
    values = [0.98, 0.9, 0.5]
    template = with_reliability(templates["llama"], values, null)
    chance = null.get("highest", null["reliability"])
    expected = [n for n, value in enumerate(values) if chance < 1 and (value - chance) / (1 - chance) >= least]
    if expected:
        assert select_neurons(template, min_reliability=least) == select_neurons(template, expected)
    else:
        with pytest.raises(FNSFTError, match=rf"no network has a reliability above null of {least:g}"):
            select_neurons(template, min_reliability=least)
    assert select_neurons(template, min_reliability=0.0) == select_neurons(template)


def test_where_the_null_is_unknown_the_bare_reliability_counts_and_a_warning_says_so(templates, caplog):
    template = with_reliability(templates["llama"], [0.98, 0.9, 0.5], None)
    assert select_neurons(template, min_reliability=0.7) == select_neurons(template, [0, 1])
    assert "does not know its null" in caplog.text
    with pytest.raises(FNSFTError, match=r"no network has a reliability \(null unknown\) of 1"):
        select_neurons(template, min_reliability=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"selector": "loudest", "fraction": 0.1},
        {"rank": "middle", "fraction": 0.1},
        {"fraction": 0.0},
        {"fraction": 1.0},
        {"selector": "random"},
        {"selector": "random", "fraction": 0.1, "component_ids": [0]},
        {"component_ids": []},
        {"rank": "lowest"},
    ],
)
def test_selections_without_a_meaning_are_errors(templates, arguments):
    with pytest.raises(FNSFTError):
        select_neurons(templates["llama"], **arguments)


def test_a_selection_that_holds_no_neuron_is_an_error(templates):
    template = templates["llama"].with_threshold(ThresholdRule())
    template.loadings = {layer: torch.ones_like(values) for layer, values in template.loadings.items()}
    with pytest.raises(FNSFTError, match="holds no neuron"):
        select_neurons(template, [0])
