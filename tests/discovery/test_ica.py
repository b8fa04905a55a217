import numpy as np
import pytest
import torch
from sklearn.decomposition import FastICA

from fnsft_trl.discovery.ica import CONTRASTS, TOLERANCE, fast_ica
from fnsft_trl.discovery.matching import match_components


def mixed(k=5, samples=5000, seed=0):
    """Laplacian, uniform and binary sources, mixed; and the mixing matrix."""
    random = np.random.default_rng(seed)
    kinds = [random.laplace, random.uniform, lambda size: random.choice([-1.0, 1.0], size)]
    sources = np.stack([kinds[c % 3](size=samples) for c in range(k)], 1)
    mixing = random.normal(size=(k, k))
    return torch.tensor(sources @ mixing.T + random.normal(size=k)), torch.tensor(mixing)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_sources_are_scikit_learns_up_to_order_and_sign(contrast):
    data, _ = mixed()
    ours = fast_ica(data, contrast=contrast, restarts=3)
    theirs = FastICA(fun=contrast, random_state=0, whiten="unit-variance", max_iter=400, tol=1e-6).fit(data.numpy())
    assert ours.change.max() < TOLERANCE
    assert match_components(torch.from_numpy(theirs.mixing_.T), ours.mixing.T)[1].min() > 0.9999


def test_sources_are_white_and_give_the_data_back():
    data, _ = mixed()
    found = fast_ica(data)
    assert torch.allclose(found.sources.T @ found.sources / len(data), torch.eye(5, dtype=data.dtype), atol=1e-9)
    assert torch.allclose(found.sources @ found.mixing.T, data - data.mean(0), atol=1e-9)


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
