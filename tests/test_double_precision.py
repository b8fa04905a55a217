"""What is told of a model is what float64 gives, at the sizes of models: large vocabularies, neurons with a mean."""

import pytest
import torch

from fnsft_trl.discovery.directions import InputSums, orthonormal
from fnsft_trl.discovery.moments import Moments
from fnsft_trl.evaluation.kl import TopDistributions, divergences
from fnsft_trl.evaluation.metrics import token_scores
from fnsft_trl.training.earlier_answers import distillation


POSITIONS = 16
EFFECT = 0.01  # change of a logit


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [50_000, 150_000])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (5, -20), (3, 100)])
def test_losses_and_divergences_over_a_vocabulary(vocabulary, scale, offset):
    base = offset + scale * drawn(POSITIONS, vocabulary)
    other = base + EFFECT * drawn(vocabulary, seed=1)
    ids = torch.arange(POSITIONS) * 7
    p, q = (logits.double().log_softmax(-1) for logits in (base, other))

    nll = -p[:-1].gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(token_scores(base, ids, 1, POSITIONS).nll.double(), nll, rtol=0, atol=5e-5)

    kl = (p.exp() * (p - q)).sum(-1)  # 5e-5 nats
    assert float((divergences(base, other).double() - kl).mean().abs()) < 1e-6

    top = TopDistributions.of(base)
    places = top.ids.long()
    kept, changed = (logs.gather(-1, places) for logs in (p, q))
    rest, changed_rest = (torch.log1p(-logs.exp().sum(-1)) for logs in (kept, changed))
    lower = (kept.exp() * (kept - changed)).sum(-1) + rest.exp() * (rest - changed_rest)
    assert float((top.divergences(other).double() - lower).mean().abs()) < 1e-6

    answered, logs = (base.double() / 2).softmax(-1), (other.double() / 2).log_softmax(-1)
    assert float(distillation(base, other, 2.0)) == pytest.approx(float(-(answered * logs).sum(-1).mean()), abs=5e-5)


def test_moments_of_neurons_that_vary_little_about_a_large_mean():
    activations = 100 + 0.1 * drawn(8192, 64)
    found = Moments.empty(64)
    for block in activations.clone().split(1024):
        found.add(Moments.centring(block))
    exact = activations.double()
    torch.testing.assert_close(found.variance, exact.var(0, unbiased=False), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-6, atol=0)


def test_directions_of_inputs_that_vary_little_about_a_large_mean():
    """They hold as much of what varies as those of float64, to a thousandth of it."""
    width, count = 96, 6
    strengths = torch.tensor([4.0, 3.5, 3.0, 2.5, 2.0, 1.8])
    varying = (drawn(8192, count) * strengths) @ drawn(count, width, seed=1) + 0.3 * drawn(8192, width, seed=2)
    inputs = 100 * drawn(width, seed=3) + 0.1 * varying
    sums = InputSums(width, count)
    for block in inputs.split(2048):
        sums.add(block[:8], block, 1 / 32, 1 / 8192)
    basis, mean = sums.directions(("module",))
    torch.testing.assert_close(mean, inputs.double().mean(0), rtol=1e-5, atol=1e-4)

    exact = inputs.double()
    first = torch.cat([block[:8] for block in exact.split(2048)]).mean(0)
    start = orthonormal(first[:, None], exact.mean(0)[:, None])
    rest = exact - (exact @ start) @ start.T
    best = torch.linalg.svd(rest, full_matrices=False).Vh[:count].T
    held, most = ((rest @ each).square().sum() / rest.square().sum() for each in (basis[:, 2:], best))
    assert most - held < 1e-3
