import pytest
import torch

from fnsft_trl.evaluation.kl import divergences
from fnsft_trl.probes.data import Item
from fnsft_trl.probes.scoring import IntactBatch


POSITIONS, VOCABULARY = 40, 50_000


def drawn(scale: float, offset: float) -> torch.Tensor:
    """Logits of a vocabulary as large as those of models, shape (1, positions, vocabulary)."""
    random = torch.Generator().manual_seed(0)
    return offset + scale * torch.randn(1, POSITIONS, VOCABULARY, generator=random)


def scores_of(logits, other):
    ids = torch.arange(POSITIONS)[None] * 7
    item = Item(0, ids[0].tolist(), (1, POSITIONS))
    return ids, IntactBatch.of([item], ids, logits).scores(other)


@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize("offset", [-20, 0, 20])
@pytest.mark.parametrize("size", [0, 1e-3, 0.1, 3])
def test_scores_are_those_in_double_precision_however_small_the_effect(scale, offset, size):
    logits = drawn(scale, offset)
    other = logits + size * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    ids, scores = scores_of(logits, other)
    p, q = logits[0, :-1].double().log_softmax(-1), other[0, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert scores.kl[0] == pytest.approx(float(kl.sum()), abs=1e-6 * POSITIONS, rel=1e-3)
    assert scores.nll[0] == pytest.approx(-float(q.gather(-1, ids[0, 1:, None]).sum()), rel=1e-5)
    assert float(divergences(logits[0], other[0])[:-1].sum()) == pytest.approx(
        float(kl.sum()), abs=1e-6 * POSITIONS, rel=1e-3
    )


@pytest.mark.parametrize("offset", [-20, 0, 20])
def test_a_model_diverges_from_itself_by_nothing(offset):
    logits = drawn(4, offset)
    assert scores_of(logits, logits.clone())[1].kl == [0.0]


def test_a_token_that_cannot_be_drawn_counts_nothing():
    logits = drawn(4, 0)
    logits[..., 3] = -torch.inf  # which the text does not hold
    assert scores_of(logits, logits.clone())[1].kl == [0.0]
