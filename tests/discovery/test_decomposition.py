import numpy as np
import pytest
import torch
from sklearn.decomposition import FastICA

from fnsft_trl import FNSFTError
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.matching import match_components
from fnsft_trl.discovery.moments import strip_width
from fnsft_trl.discovery.sketch import ActivationSketch
from fnsft_trl.discovery.units import Units


ZSCORE = Units("zscore")


def planted(tokens=6000, neurons=200, k=4, noise=0.3, seed=0, scales=None):
    """Laplacian sources over tokens that drive disjoint groups of neurons."""
    random = np.random.default_rng(seed)
    sources = random.laplace(size=(tokens, k))
    loadings = np.zeros((k, neurons))
    for c in range(k):
        loadings[c, c * 20 : (c + 1) * 20] = random.uniform(1, 2, 20) * (1 + 0.3 * c)
    data = sources @ loadings + noise * random.normal(size=(tokens, neurons)) + random.normal(size=neurons) * 5
    if scales is not None:
        data = data * scales
    return torch.tensor(data, dtype=torch.float32), torch.tensor(loadings, dtype=torch.float32)


def sketch(data, *, rank=32, reservoir=10_000, seed=0, units=None, block=97, dtype=torch.float32):
    result = ActivationSketch(data.shape[1], rank, reservoir=reservoir, seed=seed, units=units, dtype=dtype)
    for rows in data.to(dtype).split(block):
        result.update(rows)
    result.finish()
    return result


def halves(data, **settings):
    return [[sketch(data[half::2], seed=half, **settings)] for half in (0, 1)]


def test_moments_are_exact():
    data, _ = planted(tokens=1003)
    result = decompose(halves(data), IcaSettings(4))
    assert result.moments.count == 1003
    assert torch.allclose(result.moments.mean, data.double().mean(0), atol=1e-5)
    assert torch.allclose(result.moments.rms, data.double().square().mean(0).sqrt(), atol=1e-4)


def test_sketch_of_enough_rank_is_the_exact_covariance():
    data, _ = planted(tokens=700, neurons=24, k=1)
    s = sketch(data, rank=24, dtype=torch.float64)
    centred = (data - data.mean(0)).double()
    assert torch.allclose(s.rows.T @ s.rows, centred.T @ centred, atol=1e-4, rtol=1e-5)
    # scores are coordinates along the sketch's directions
    basis = s.rows / s.singular[:, None]
    assert torch.allclose(s.scores.double(), centred @ basis.T, atol=1e-4)


def test_principal_directions_of_a_truncated_sketch():
    data, _ = planted(tokens=4000)
    s = sketch(data, rank=16)
    exact = torch.linalg.svd((data - data.mean(0)).double(), full_matrices=False).Vh[:4]
    basis = (s.rows[:4].double().T / s.singular[:4]).T
    cosines = torch.linalg.svdvals(basis @ exact.T)
    assert cosines.min() > 0.999


def test_sketch_does_not_depend_on_how_the_stream_is_cut():
    data, _ = planted(tokens=1000)
    one, other = sketch(data, block=97), sketch(data, block=1000)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.scores, other.scores)


def test_a_sketch_does_not_depend_on_how_many_neurons_are_worked_on_at_a_time(monkeypatch):
    assert strip_width(torch.device("cuda")) > strip_width(torch.device("cpu"))
    data, _ = planted(tokens=1000)
    whole = sketch(data, units=ZSCORE, dtype=torch.float64)
    monkeypatch.setattr("fnsft_trl.discovery.moments.COLUMNS", 7)
    strips = sketch(data, units=ZSCORE, dtype=torch.float64)
    assert torch.allclose(strips.rows.T @ strips.rows, whole.rows.T @ whole.rows, rtol=1e-6, atol=1e-6)
    assert torch.allclose(strips.moments.m2, whole.moments.m2)


@pytest.mark.parametrize("standardize", ["center", "zscore"])
@pytest.mark.parametrize("variant", ["temporal", "spatial"])
def test_planted_networks_are_recovered(standardize, variant):
    data, loadings = planted()
    units = Units(standardize)
    result = decompose(halves(data, units=units), IcaSettings(4, variant=variant, seed=1), units)
    expected = loadings / data.std(0) if standardize == "zscore" else loadings
    partner, correlation = match_components(expected, result.loadings)
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    assert correlation.min() > 0.98
    if variant == "temporal":
        assert min(result.reliability) > 0.98
        assert result.converged


def test_power_of_spatial_components_is_that_of_the_planted_ones():
    data, loadings = planted()
    temporal, spatial = (
        decompose(halves(data), IcaSettings(4, variant=variant)) for variant in ("temporal", "spatial")
    )
    planted_power = loadings.square().sum(1) * 2  # a Laplacian source has variance 2
    for result in (temporal, spatial):
        partner, _ = match_components(loadings, result.loadings)
        power = result.loadings.square().sum(1)[partner]
        assert torch.allclose(power, planted_power, rtol=0.25)
        assert power.argsort().tolist() == planted_power.argsort().tolist()


def test_a_stream_that_starts_without_variance_is_absorbed():
    data, loadings = planted(tokens=2000)
    start = torch.zeros(100, data.shape[1]) + data.mean(0)
    result = decompose(halves(torch.cat([start, data])), IcaSettings(4))
    assert match_components(loadings, result.loadings)[1].min() > 0.9
    single = ActivationSketch(3, 1, reservoir=10, seed=0)
    single.update(torch.tensor([[1.0, 2, 3], [2, 2, 3], [4, 2, 3]]))
    single.finish()
    assert single.count == 3
    assert torch.isfinite(single.scores).all()


@pytest.mark.parametrize("contrast", ["logcosh", "cube", "exp"])
def test_recovery_is_not_worse_than_scikit_learn_on_the_whole_matrix(contrast):
    data, loadings = planted(noise=1.0)
    ours = decompose(halves(data), IcaSettings(4, contrast=contrast)).loadings
    ica = FastICA(4, fun=contrast, random_state=0, whiten="unit-variance").fit(data.numpy().astype(np.float64))
    theirs = torch.tensor(ica.mixing_.T, dtype=torch.float32)
    assert match_components(loadings, ours)[1].min() > match_components(loadings, theirs)[1].min() - 0.01


def test_zscored_loadings_are_correlations_and_ignore_scale():
    data, _ = planted()
    scales = torch.logspace(-3, 3, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    plain, scaled = (
        decompose(halves(d, units=ZSCORE, rank=64), IcaSettings(4), ZSCORE).loadings for d in (data, data * scales)
    )
    assert scaled.abs().max() <= 1.02
    assert match_components(plain, scaled)[1].min() > 0.995


def test_shuffled_time_has_no_reliable_networks():
    data, _ = planted(tokens=2000)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([column[torch.randperm(len(column), generator=generator)] for column in data.T], dim=1)
    null, found = (decompose(halves(d, units=ZSCORE), IcaSettings(4), ZSCORE) for d in (shuffled, data))
    assert np.mean(null.reliability) < 0.35
    assert np.mean(found.reliability) > 0.98


def test_reservoir_is_capped_and_components_hardly_change():
    data, _ = planted()
    whole, sampled = decompose(halves(data), IcaSettings(4)), decompose(halves(data, reservoir=800), IcaSettings(4))
    assert [len(s.scores) for (s,) in halves(data, reservoir=800)] == [800, 800]
    assert match_components(whole.loadings, sampled.loadings)[1].min() > 0.98


def test_reservoir_samples_the_whole_stream_evenly():
    data = torch.arange(5000, dtype=torch.float32)[:, None] * torch.tensor([[1.0, -1.0]])
    scores = sketch(data, rank=2, reservoir=500).scores[:, 0]
    position = (scores - scores.mean()) / 2**0.5
    assert position.abs().max() > 2300
    assert abs(position.std() - 5000 / 12**0.5) < 150


def test_order_and_sign_are_canonical_and_runs_repeat_bit_for_bit():
    data, _ = planted()
    one, two = (decompose(halves(data), IcaSettings(4)) for _ in range(2))
    assert torch.equal(one.loadings, two.loadings)
    assert one.explained_variance == sorted(one.explained_variance, reverse=True)
    peaks = one.loadings.gather(1, one.loadings.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    assert 0 < sum(one.explained_variance) <= 1


@pytest.mark.parametrize("standardize", ["center", "zscore"])
def test_constant_neurons_get_no_loading(standardize):
    data, _ = planted()
    data[:, 150:] = 3.0
    units = Units(standardize)
    result = decompose(halves(data, units=units), IcaSettings(4), units)
    assert not result.loadings[:, 150:].any()
    assert torch.isfinite(result.loadings).all()


def test_too_little_data_is_an_error():
    data, _ = planted(tokens=8)
    with pytest.raises(FNSFTError, match=r"8 tokens were read.*ica_components"):
        decompose(halves(data), IcaSettings(4))
    flat = torch.ones(100, 30) * torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FNSFTError, match="span 1 direction"):
        decompose(halves(flat), IcaSettings(4))


def test_fewer_tokens_than_the_rank_are_fine():
    data, _ = planted(tokens=60, noise=0.01)
    result = decompose(halves(data, rank=64), IcaSettings(4))
    assert result.loadings.shape == (4, 200)
