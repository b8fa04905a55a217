"""Masks do what they say and nothing else (invariants 1 and 2)."""

import pytest
import torch
from helpers import VOCABULARY, logits, random_mask, tiny_model, zeroed

from fnsft_trl import lesion, preserve
from fnsft_trl.neurons.sites import SITES


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SITES)
def test_lesion_is_preserve_of_the_rest_is_zeroed_weights(family, kind, ids):
    model = tiny_model(family)
    mask = random_mask(model, kind)
    plain = logits(model, ids)
    with lesion(model, mask):
        lesioned = logits(model, ids)
    with preserve(model, ~mask):
        assert torch.equal(logits(model, ids), lesioned)
    assert torch.allclose(logits(zeroed(model, mask), ids), lesioned, atol=1e-6)
    assert not torch.allclose(plain, lesioned, atol=1e-3)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("kind", SITES)
def test_a_mask_that_silences_nothing_changes_nothing(family, kind, ids):
    model = tiny_model(family)
    everything = random_mask(model, kind) | ~random_mask(model, kind)
    plain = logits(model, ids)
    with preserve(model, everything):
        assert torch.equal(logits(model, ids), plain)
