import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_rows
from sklearn.decomposition import FastICA

import fnsft_trl
from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks
from fnsft_trl.discovery.ica import CONTRASTS, TOLERANCE, fast_ica
from fnsft_trl.discovery.matching import match_components


BACKENDS = ["torch", "sklearn"]


def mixed(k=5, samples=5000, seed=0):
    """Laplacian, uniform and binary sources, mixed; and the mixing matrix."""
    random = np.random.default_rng(seed)
    kinds = [random.laplace, random.uniform, lambda size: random.choice([-1.0, 1.0], size)]
    sources = np.stack([kinds[c % 3](size=samples) for c in range(k)], 1)
    mixing = random.normal(size=(k, k))
    return torch.tensor(sources @ mixing.T + random.normal(size=k)), torch.tensor(mixing)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_sources_are_those_of_scikit_learns_whole_pipeline(contrast):
    data, _ = mixed()
    ours = fast_ica(data, contrast=contrast, restarts=3)
    theirs = FastICA(fun=contrast, random_state=0, whiten="unit-variance", max_iter=400, tol=1e-6).fit(data.numpy())
    assert ours.change.max() < TOLERANCE
    assert match_components(torch.from_numpy(theirs.mixing_.T), ours.mixing.T)[1].min() > 0.9999


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_backends_find_the_same_sources(contrast, dtype):
    data = mixed(k=9)[0].to(dtype)
    ours, theirs = (fast_ica(data, contrast=contrast, restarts=4, backend=backend) for backend in BACKENDS)
    assert max(ours.change.max(), theirs.change.max()) < TOLERANCE
    assert match_components(ours.mixing.T, theirs.mixing.T)[1].min() > 0.999
    assert match_components(ours.sources.T, theirs.sources.T)[1].min() > 0.999
    assert ours.sources.dtype == theirs.sources.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_both_backends_find_the_same_networks(tokenizer, contrast):
    texts = [row["prompt"] + row["completion"] for row in tiny_rows(900)]
    settings = {"ica_components": 2, "ica_rank": 16, "ica_max_length": 32, "ica_max_tokens": 6000}
    ours, theirs = (
        discover_networks(
            tiny_model("gpt2"),
            tokenizer,
            texts,
            FunctionalNetworkConfig(**settings, ica_contrast=contrast, ica_backend=backend),
        )
        for backend in BACKENDS
    )
    assert match_components(ours.pooled()[0], theirs.pooled()[0])[1].min() > 0.999
    for one, other in zip(ours.components, theirs.components, strict=True):
        assert one.reliability == pytest.approx(other.reliability, abs=1e-3)
    assert [template.settings["ica_backend"] for template in (ours, theirs)] == BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_gives_the_same_bits(backend):
    data, _ = mixed()
    one, two, other = (fast_ica(data, restarts=3, seed=seed, backend=backend) for seed in (0, 0, 1))
    assert torch.equal(one.sources, two.sources)
    assert torch.equal(one.mixing, two.mixing)
    assert not torch.equal(one.mixing, other.mixing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_that_did_not_settle_are_reported_and_nothing_else_is(backend):
    noise = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fast_ica(noise, max_iterations=2, backend=backend)
    assert found.change.max() > TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_are_white_and_give_the_data_back(backend):
    data, _ = mixed()
    white = fast_ica(data).sources  # scikit-learn's own whitening would lose sources of data that is white
    for given in (data, white):
        found = fast_ica(given, backend=backend)
        assert torch.allclose(found.sources.T @ found.sources / len(data), torch.eye(5, dtype=data.dtype), atol=1e-9)
        assert torch.allclose(found.sources @ found.mixing.T, given - given.mean(0), atol=1e-9)


def test_scikit_learn_is_loaded_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    data, _ = mixed(samples=100)
    fast_ica(data)
    with pytest.raises(ImportError, match=r"sklearn\.decomposition"):
        fast_ica(data, backend="sklearn")
    for path in Path(fnsft_trl.__file__).parent.rglob("*.py"):
        assert not re.search(r"^(from|import) sklearn", path.read_text(), flags=re.MULTILINE), path


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_derivatives_and_the_normal_expectation_belong_to_the_contrast(contrast):
    derivative, function, of_normal = CONTRASTS[contrast]
    u = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(u).sum(), u, create_graph=True)
    g, mean_curvature = derivative(u)
    assert torch.allclose(slope, g)
    assert torch.allclose(torch.autograd.grad(slope.sum(), u)[0].mean(), mean_curvature)
    normal = torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(float(function(normal).mean()) - of_normal) < 3e-3


def test_the_best_of_several_starts_is_kept():
    """With many Gaussian directions a single start misses sources that one of several finds."""
    random = torch.Generator().manual_seed(0)
    data = torch.randn(600, 12, generator=random, dtype=torch.float64)
    data[:, 0] = data[:, 0].sign()
    _, function, of_normal = CONTRASTS["logcosh"]
    gains = {1: 0.0, 8: 0.0}
    for restarts in gains:
        for seed in range(6):
            sources = fast_ica(data, restarts=restarts, seed=seed).sources
            gains[restarts] += float((function(sources).mean(0) - of_normal).square().sum())
    assert gains[8] > 1.02 * gains[1]


def test_only_the_needed_sources_have_to_settle():
    data, _ = mixed(k=3)
    noise = 0.01 * torch.randn(len(data), 3, generator=torch.Generator().manual_seed(0), dtype=data.dtype)
    both = torch.cat([data, noise], 1)
    few, all_of_them = fast_ica(both, needed=3), fast_ica(both)
    assert few.change[few.mixing.norm(dim=0).topk(3).indices].max() < TOLERANCE
    assert few.iterations < all_of_them.iterations


@pytest.mark.parametrize("backend", ["torch", "sklearn"])
def test_columns_that_follow_from_others_are_one_line(backend):
    data = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    for column in (data[:, 0] * 2 - data[:, 1], torch.ones(500), torch.zeros(500)):
        with pytest.raises(FNSFTError, match=r"the 5 columns .* span only 4 dimensions .*ica_components"):
            fast_ica(torch.cat([data, column[:, None]], 1), backend=backend)
    spread = data * torch.tensor([1e4, 1.0, 1e-4, 1e-6])  # of any size, as long as they are independent
    assert fast_ica(spread, backend=backend).sources.isfinite().all()
