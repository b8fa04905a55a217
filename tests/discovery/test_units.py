"""Neurons of any scale: what is found is what exact arithmetic finds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnsft_trl import FNSFTError
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.ica import fast_ica
from fnsft_trl.discovery.matching import match_components
from fnsft_trl.discovery.moments import Moments
from fnsft_trl.discovery.sketch import ActivationSketch
from fnsft_trl.discovery.units import Units


TOKENS, NEURONS, NETWORKS = 2000, 120, 3
LAYERS = (slice(0, 60), slice(60, NEURONS))


def planted(seed=0):
    """Three networks of 15 neurons each, and neurons that belong to none: (activations, loadings)."""
    random = torch.Generator().manual_seed(seed)
    loadings = torch.zeros(NETWORKS, NEURONS)
    for number in range(NETWORKS):
        loadings[number, 15 * number : 15 * number + 15] = 1 + torch.rand(15, generator=random) + 0.4 * number
    sources = laplacian((TOKENS, NETWORKS), random)
    noise = 0.3 * torch.randn(TOKENS, NEURONS, generator=random)
    return sources @ loadings + noise + 3 * torch.randn(NEURONS, generator=random), loadings


def laplacian(shape, random):
    uniform = torch.rand(shape, generator=random) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.4999999)) / 2**0.5


def sketched(data, units, rank=40, dtype=torch.float32):
    sketch = ActivationSketch(data.shape[1], rank, reservoir=10_000, seed=0, units=units, dtype=dtype)
    for rows in data.to(dtype).split(97):
        sketch.update(rows)
    sketch.finish()
    return sketch


def found(data, units, components, **settings):
    halves = [[sketched(data[half::2], units, **settings)] for half in (0, 1)]
    return decompose(halves, IcaSettings(components), units)


def exact_divisor(data, standardize):
    """What the units are said to be: float64, neuron by neuron."""
    x = data.double()
    variance = (x - x.mean(0)).square().mean(0).tolist()
    if standardize == "zscore":
        return torch.tensor(variance).sqrt()
    order = sorted(range(len(variance)), key=lambda neuron: -variance[neuron])
    divisor = [1.0] * len(variance)
    for place in range(7, -1, -1):
        weaker = math.fsum(variance[neuron] for neuron in order[place + 1 :])
        if variance[order[place]] > weaker:
            for neuron in order[: place + 1]:
                divisor[neuron] = math.sqrt(variance[neuron] / weaker)
            break
    return torch.tensor(divisor, dtype=torch.float64)


def exact_directions(data, divisor, count):
    """Principal directions of all tokens, and the coordinates along them, through a float64 SVD."""
    x = data.double()
    left, singular, right = torch.linalg.svd((x - x.mean(0)) / divisor, full_matrices=False)
    return (left * singular)[:, :count], right[:count]


def exact_networks(data, standardize, components):
    """The same ICA on exact principal directions."""
    scores, directions = exact_directions(data, exact_divisor(data, standardize), math.ceil(1.5 * components))
    loadings = fast_ica(scores, restarts=4, needed=components).mixing.T @ directions
    return loadings[loadings.square().sum(1).argsort(descending=True)[:components]].float()


def with_massive(data, factor, neurons, course, seed=0):
    """The activations with some neurons that are so many times as strong as the others."""
    random = torch.Generator().manual_seed(seed)
    values = laplacian((len(data), len(neurons)), random)
    if course == "rare":  # on one token of a hundred, the same for all of them
        values *= torch.rand(len(data), 1, generator=random) < 0.01
    elif course == "late":  # long after the sketch has taken its first units
        values *= (torch.arange(len(data)) > 0.8 * len(data))[:, None]
    data = data.clone()
    data[:, neurons] = factor * (values + 0.5)
    return data


FACTORS = st.floats(3, 30).map(lambda exponent: 10.0**exponent)
PLACES = st.lists(st.integers(50, NEURONS - 1), min_size=1, max_size=3, unique=True)
COURSES = st.sampled_from(["dense", "rare", "late"])
STANDARDIZE = st.sampled_from(["center", "zscore"])


@pytest.mark.slow
@settings(max_examples=15, derandomize=True, deadline=None)
@given(FACTORS, PLACES, COURSES, STANDARDIZE)
def test_networks_without_massive_neurons_are_those_of_a_model_that_has_none(factor, neurons, course, standardize):
    data, _ = planted()
    units = Units(standardize, drop_massive=30.0, layers=LAYERS)
    without = found(with_massive(data, factor, neurons, course), units, NETWORKS)
    silent = data.clone()
    silent[:, neurons] = 0
    expected = found(silent, Units(standardize), NETWORKS)
    assert not without.loadings[:, neurons].any()
    assert match_components(expected.loadings, without.loadings)[1].min() > 0.999
    assert without.reliability == pytest.approx(expected.reliability, abs=0.01)
    assert sum(without.explained_variance) == pytest.approx(sum(expected.explained_variance), rel=0.01)


@pytest.mark.slow
@settings(max_examples=15, derandomize=True, deadline=None)
@given(FACTORS, PLACES, COURSES, STANDARDIZE)
def test_networks_beside_massive_neurons_are_those_of_exact_arithmetic(factor, neurons, course, standardize):
    data, loadings = planted()
    massive = with_massive(data, factor, neurons, course)
    units = Units(standardize)
    result = found(massive, units, NETWORKS + len(neurons))
    others = [neuron for neuron in range(NEURONS) if neuron not in neurons]
    exact = exact_networks(massive, standardize, NETWORKS + len(neurons))
    expected = loadings[:, others] / (data.std(0)[others] if standardize == "zscore" else 1)
    for networks in (result.loadings[:, others], exact[:, others]):
        assert match_components(expected, networks)[1].min() > 0.97
    places = [match_components(expected, n)[0] for n in (result.loadings[:, others], exact[:, others])]
    pairs = zip(result.loadings[places[0]][:, others], exact[places[1]][:, others], strict=True)
    assert min(float(torch.corrcoef(torch.stack(pair))[0, 1].abs()) for pair in pairs) > 0.998
    assert torch.isfinite(result.loadings).all()
    assert result.explained_variance == sorted(result.explained_variance, reverse=True)
    is_massive = set(units.massive(result.moments).nonzero().flatten().tolist())
    assert is_massive == (set(neurons) if standardize == "center" else set())


@pytest.mark.parametrize("standardize", ["center", "zscore"])
def test_directions_of_neurons_of_any_scale_are_exact(standardize):
    random = torch.Generator().manual_seed(1)
    for spread in (1e-4, 1e-2):
        scales = torch.logspace(math.log10(spread), 8, NEURONS)[torch.randperm(NEURONS, generator=random)]
        data = planted()[0] * scales
        sketch = sketched(data, Units(standardize))
        exact = exact_directions(data, sketch.divisor, NETWORKS)[1]
        basis = sketch.rows[:NETWORKS].double() / sketch.singular[:NETWORKS, None]
        assert torch.linalg.svdvals(basis @ exact.T).min() > 0.999
        networks = found(data, Units(standardize), NETWORKS).loadings
        assert match_components(exact_networks(data, standardize, NETWORKS), networks)[1].min() > 0.999


def test_units_of_the_centred_are_those_of_the_activations_unless_a_neuron_is_massive():
    data, _ = planted()
    moments = Moments.centring(data.double().clone())
    assert torch.equal(Units().divisor(moments), torch.ones(NEURONS).double())
    massive = with_massive(data, 1e6, [70, 90], "dense")
    divisor = Units().divisor(Moments.centring(massive.double().clone()))
    torch.testing.assert_close(divisor, exact_divisor(massive, "center"))
    assert (divisor != 1).nonzero().flatten().tolist() == [70, 90]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12, 1e25])
def test_the_scale_of_all_neurons_together_counts_for_nothing(scale):
    data, _ = planted()
    plain, scaled = (found(d, Units(), NETWORKS) for d in (data, data * scale))
    assert match_components(plain.loadings, scaled.loadings)[1].min() > 0.9999
    torch.testing.assert_close(scaled.loadings / scale, plain.loadings, rtol=1e-2, atol=1e-2)
    assert scaled.explained_variance == pytest.approx(plain.explained_variance, rel=1e-3)


def test_too_few_directions_are_told_with_what_helps():
    data, _ = planted()
    flat = torch.randn(TOKENS, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(NEURONS)
    with pytest.raises(FNSFTError, match=r"span 1 directions.*give more varied text"):
        found(flat, Units(), NETWORKS)
    few = torch.cat([flat[:, :70], 100 * data[:, :50]], 1)
    with pytest.raises(FNSFTError, match=r"raise ica_drop_massive, which leaves out 50 neurons"):
        found(few, Units("center", drop_massive=10.0, layers=[slice(0, NEURONS)]), NETWORKS)
    sink = data + 1e7 * (torch.arange(TOKENS) % 200 == 0)[:, None]  # one token that drowns all others
    with pytest.raises(FNSFTError, match=r"a few tokens.*ica_skip_tokens.*ica_dtype=float64"):
        found(sink, Units(), NETWORKS)
    assert found(sink, Units(), NETWORKS, dtype=torch.float64).loadings.shape == (NETWORKS, NEURONS)


def test_by_layers_the_scale_of_a_layer_changes_nothing_and_that_of_a_neuron_does():
    data, _ = planted()
    units = Units("layer", layers=LAYERS)
    expected = found(data, units, NETWORKS)
    louder = data.clone()
    louder[:, LAYERS[1]] *= 1024  # a power of two, by which no bit of a result changes
    scaled = found(louder, units, NETWORKS)
    assert torch.equal(scaled.loadings, expected.loadings)
    assert scaled.explained_variance == expected.explained_variance
    variance = expected.moments.variance / units.divisor(expected.moments).square()
    for columns in LAYERS:
        assert float(variance[columns].mean()) == pytest.approx(1, abs=1e-6)
    louder = data.clone()
    louder[:, 100] *= 16
    assert not torch.equal(found(louder, units, NETWORKS).loadings, expected.loadings)


def test_by_layers_a_massive_neuron_counts_for_no_more_than_its_layer():
    data, _ = planted()
    units = Units("layer", layers=LAYERS)
    loud = found(with_massive(data, 1e12, [70], "dense"), units, NETWORKS)
    assert units.massive(loud.moments).nonzero().flatten().tolist() == [70]
    variance = loud.moments.variance / units.divisor(loud.moments).square()
    assert float(variance[70]) == pytest.approx(float(variance[LAYERS[1]].sum() - variance[70]), rel=1e-6)
