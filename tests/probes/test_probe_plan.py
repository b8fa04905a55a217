from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import tiny_model

from fnsft_trl.probes.config import CURVES
from fnsft_trl.probes.controls import DRAWN, MATCHED, Controls, strata, weight_norms
from fnsft_trl.probes.plan import networks_of, plan


@pytest.fixture(scope="module")
def controls(templates):
    return Controls(tiny_model("llama"), templates["llama"], templates["llama"])


def test_every_control_has_as_many_neurons_in_every_layer(controls, templates):
    (network,) = networks_of(controls, [0])
    counts = {layer: int(members.sum()) for layer, members in network.mask.layers.items()}
    for name in controls.names():
        masks = list(controls.draws(name, network.mask, 4, seed=0))
        most = len(templates["llama"].components) if name == "surrogate" else 4
        assert len(masks) == (min(4, most) if name in DRAWN else 1)
        for mask in masks:
            assert {layer: int(members.sum()) for layer, members in mask.layers.items()} == counts
        if name in DRAWN:
            assert len(set(masks)) > 1
        assert masks == list(controls.draws(name, network.mask, 4, seed=0))  # the same by the same seed


def test_what_is_matched_in_amplitude_is_as_loud(controls):
    (network,) = networks_of(controls, [0])
    loudest = next(controls.draws("activation_rms", network.mask, 1, seed=0))
    for mask in controls.draws("rms_matched", loudest, 5, seed=0):
        assert controls.loudness(mask, loudest) == pytest.approx(1, abs=0.15)
    quiet = [controls.loudness(mask, loudest) for mask in controls.draws("random", loudest, 5, seed=0)]
    assert max(quiet) < 1


def test_strata_hold_every_neuron_once_and_are_fine_where_it_is_loud():
    rms = torch.rand(100, generator=torch.Generator().manual_seed(0))
    parts = strata(rms)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    assert [len(part) for part in parts[:3]] == [8, 8, 16]
    assert all(rms[a].min() >= rms[b].max() for a, b in pairwise(parts))


def test_weight_norms_are_those_of_the_rows_and_the_column(templates):
    model = tiny_model("llama")
    found = weight_norms(model, templates["llama"])
    mlp = model.model.layers[1].mlp
    parts = [mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3]]
    parts += [mlp.gate_proj.bias[3:4], mlp.up_proj.bias[3:4]]
    assert float(found[1][3]) == pytest.approx(float(torch.cat(parts).detach().norm()), rel=1e-6)


@pytest.mark.parametrize("curve", CURVES)
def test_the_plan_has_the_curves_that_are_asked_for_and_no_other(curve, controls):
    conditions = plan(networks_of(controls, [0, 1]), curves=[curve], draws=3)
    assert {condition.curve for condition in conditions} - {"cut"} == {"full", curve}


@pytest.mark.parametrize("curve", ["lesion", "amplify"])
def test_networks_share_no_draw(curve, controls):
    """Not even two that have the same neurons: the null distribution of the verdicts takes draws for independent."""
    (network,) = networks_of(controls, [0])
    conditions = plan([network, replace(network, label="again")], curves=[curve], draws=20, seed=1)
    for name in MATCHED:
        of_network = [{c.key for c in conditions if (c.network, c.selector) == (n, name)} for n in ("0", "again")]
        assert all(len(keys) > 10 for keys in of_network)
        assert not of_network[0] & of_network[1]


def test_the_plan_has_every_curve_with_controls(controls, templates):
    networks = networks_of(controls, [0, 1])
    conditions = plan(networks, draws=20)
    assert {condition.curve for condition in conditions} == {"full", "cut", *CURVES}
    for network in ("0", "1"):
        lesions = [c for c in conditions if c.curve == "lesion" and c.network == network]
        for name in controls.names():
            drawn = [c for c in lesions if c.selector == name]
            assert len(drawn) >= (20 if name in MATCHED else 3 if name in DRAWN else 1)
    for curve in CURVES:
        of_curve = [c for c in conditions if c.curve == curve]
        assert {"networks", "random", "rms_matched"} <= {c.selector for c in of_curve}
    (pruned,) = [c for c in conditions if c.curve == "prune" and c.selector == "networks"]
    layers = sorted(pruned.mask.layers)
    assert pruned.ablation == "mean"
    assert not any(pruned.mask.layers[layer].any() for layer in (layers[0], layers[-1]))  # first and last are kept
    union = networks[0].mask | networks[1].mask
    assert torch.equal(pruned.mask.layers[layers[1]], ~union.layers[layers[1]])
    (kept,) = [c for c in conditions if c.curve == "kept" and c.selector == "networks"]
    assert kept.mask == ~union
    many = [c for c in conditions if c.selector == "random_15"]
    assert all(c.mask.fraction == pytest.approx(0.15, abs=0.01) for c in many)
    keys = {(c.key): (c.mask, c.factor, c.ablation) for c in conditions}
    assert len({c.key for c in conditions}) == len(keys)
