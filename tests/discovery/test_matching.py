"""How alike components are, and which is which."""

import pytest
import torch

from fnsft_trl.discovery.matching import correlation, dice, match_components, match_rows, overlap


def test_overlap_dice_and_correlation_of_known_sets():
    a = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    b = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    assert overlap(a, b).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert dice(0.5) == pytest.approx(2 * 2 / (3 + 3))
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    values = correlation(x, torch.stack([-3 * x[1] + 2, torch.ones(50)]))
    assert values[1, 0] == pytest.approx(1)
    assert values[:, 1].tolist() == [0, 0]
    assert values[0, 0] == pytest.approx(abs(float(torch.corrcoef(x)[0, 1])), abs=1e-5)


def test_matching_is_one_to_one_and_finds_order_and_sign():
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(5, 80, generator=generator)
    order = torch.randperm(5, generator=generator)
    partner, found = match_components(loadings, -2 * loadings[order])
    assert torch.equal(order[partner], torch.arange(5))
    assert found.min() > 1 - 1e-9


def test_rows_left_over_have_no_partner():
    assert match_rows(torch.tensor([[0.1], [0.9], [0.2]])).tolist() == [-1, 0, -1]
    assert match_rows(torch.tensor([[0.2, 0.9, 0.8]])).tolist() == [1]


def test_one_near_perfect_pair_is_worth_more_than_two_fair_ones():
    assert match_rows(torch.tensor([[0.999, 0.7], [0.7, 0.0]])).tolist() == [0, 1]  # the sums are .999 and 1.4
