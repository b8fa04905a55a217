"""Reliability without co-activation, and that no decision takes it for reliability."""

import hashlib

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks, select_neurons
from fnsft_trl.discovery.activations import ActivationBlock, ActivationReader
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.null import null_reliability
from fnsft_trl.discovery.sketch import ActivationSketch
from fnsft_trl.discovery.units import Units
from fnsft_trl.template.description import NullReliability, reliability_above_null


def independent(tokens, deviations, seed=0):
    """Activations of neurons that do nothing together, with heavy tails."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, len(deviations), generator=random)
    return values * torch.rand(tokens, len(deviations), generator=random).mul(4).exp() * deviations / 10


def halves(data, units):
    sketches = []
    for number in (0, 1):
        sketch = ActivationSketch(data.shape[1], 32, reservoir=4000, seed=number, units=units)
        for rows in data[number::2].split(500):
            sketch.update(rows)
        sketch.finish()
        sketches.append([sketch])
    return sketches


def measured(data, components, units):
    """Bare reliability of the networks, the null, and mean reliability above it."""
    parts = halves(data, units)
    reliability = decompose(parts, IcaSettings(components), units).reliability
    null = null_reliability(parts, IcaSettings(components), units)
    above = [reliability_above_null(value, NullReliability(**null)) for value in reliability]
    return torch.tensor(reliability), null, torch.tensor(above)


@pytest.mark.slow
@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    neurons=st.sampled_from([60, 700]),
    loud=st.integers(0, 12),
    strength=st.floats(2, 40),
    spread=st.floats(0, 1.5),
    tokens=st.sampled_from([1500, 6000]),
    components=st.sampled_from([3, 6]),
)
def test_neurons_that_do_nothing_together_are_not_reliable_above_null(
    neurons, loud, strength, spread, tokens, components
):
    random = torch.Generator().manual_seed(1)
    deviations = (spread * torch.randn(neurons, generator=random)).exp()
    deviations[:loud] = strength * deviations.max()
    for standardize in ("center", "zscore"):
        _, null, above = measured(independent(tokens, deviations), components, Units(standardize))
        assert above.mean() < 0.5, standardize
        assert 0 <= null["reliability"] <= null["highest"] <= 1
        assert standardize == "center" or null["highest"] < 0.5


def test_a_few_loud_neurons_are_reliable_by_themselves_and_the_null_says_so():
    deviations = torch.ones(900)
    deviations[torch.randperm(900, generator=torch.Generator().manual_seed(0))[:8]] = torch.linspace(8, 40, 8)
    reliability, null, above = measured(independent(8000, deviations), 5, Units())
    assert reliability.mean() > 0.95
    assert null["reliability"] > 0.95  # though 512 of 900 neurons drawn at random would miss half of them
    assert above.mean() < 0.5


def test_networks_are_reliable_above_null_wherever_there_are_any():
    random = torch.Generator().manual_seed(0)
    sources = torch.randn(6000, 4, generator=random) ** 3
    loadings = torch.zeros(4, 300)
    for number in range(4):
        loadings[number, 30 * number : 30 * number + 30] = 1
    data = sources @ loadings + torch.randn(6000, 300, generator=random)
    for standardize in ("center", "zscore"):
        assert measured(data, 4, Units(standardize))[2].min() > 0.9


@pytest.mark.parametrize("standardize", ["center", "zscore"])
def test_the_null_of_a_sample_of_neurons_is_that_of_all_of_them(standardize):
    data = independent(4000, torch.logspace(0, 1.5, 2500))
    units = Units(standardize)
    parts = halves(data, units)
    whole = decompose(parts, IcaSettings(6), units)  # no two of them do anything together: this is a null by itself
    null = null_reliability(parts, IcaSettings(6), units)
    assert null["reliability"] == pytest.approx(sum(whole.reliability) / 6, abs=0.12)
    assert max(whole.reliability) - 0.1 < null["highest"] < max(whole.reliability) + 0.3
    assert null["jaccard"] == pytest.approx(sum(whole.jaccard) / 6, abs=0.08)


def test_the_null_is_of_the_neurons_that_take_part():
    deviations = torch.linspace(1, 2, 100)
    data = independent(3000, deviations)
    loud = data.clone()
    loud[:, 7] *= 1e6
    units = Units("center", drop_massive=30.0, layers=[slice(0, 100)])
    quiet = data.clone()
    quiet[:, 7] = 0
    nulls = [measured(d, 3, u)[1] for d, u in ((loud, units), (quiet, Units()))]
    assert nulls[0]["reliability"] == pytest.approx(nulls[1]["reliability"], abs=0.15)
    assert max(null["highest"] for null in nulls) < 0.9
    assert measured(loud, 3, Units())[1]["highest"] > 0.99  # one neuron that is a component by itself


def test_the_same_seed_gives_the_same_null():
    data = independent(1000, torch.ones(80))
    one, two, other = (
        null_reliability(halves(data, Units()), IcaSettings(3, seed=seed), Units()) for seed in (0, 0, 1)
    )
    assert one == two != other


def test_no_discovery_stops_and_no_network_is_chosen_for_what_chance_gives(tokenizer, monkeypatch, caplog):
    """The decisions themselves, on activations without co-activation of which a few neurons are loud."""
    monkeypatch.setattr("fnsft_trl.discovery.discovery._FIRST_CHECK", 1000)

    def read(self, sources, *, max_tokens, **_):
        deviations = torch.ones(self.width)
        deviations[:6] = torch.linspace(10, 30, 6)
        data = independent(max_tokens, deviations, seed=3)
        self.digests, self.tokens = [hashlib.sha256()], [0]
        for number, rows in enumerate(data.split(500)):
            self.tokens[0] += len(rows)
            yield ActivationBlock(number, rows, torch.arange(len(rows)) % 2)

    monkeypatch.setattr(ActivationReader, "read", read)
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_tokens=6000, ica_until_reliable=0.8)
    template = discover_networks(tiny_model("llama"), tokenizer, [], config)
    assert min(component.reliability for component in template.components) > 0.9
    assert template.calibration["tokens"] == 6000
    curve = template.calibration["curve"]
    assert len(curve) > 3
    assert all(point["reliability"] > 0.8 > point["above_null"] for point in curve)
    assert "the mean reliability above null is 0." in caplog.text
    assert "z-scored" in caplog.text
    with pytest.raises(FNSFTError, match=r"no network has a reliability above null of 0\.8.*z-scored"):
        select_neurons(template, min_reliability=0.8)
