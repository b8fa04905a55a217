"""Comparisons over seeds and articles, against values worked out by hand."""

import math

import numpy as np
import pytest

from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.paired import Ratio, holm, sign_flip, two_way_draws


def test_signs_are_all_tried():
    # of 2^5 sums only those of +++++ and ----- are as far from 0
    assert sign_flip([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    # |1 + 2 - 3| = 0 is reached by every choice
    assert sign_flip([1, 2, -3]) == 1.0
    # 4, and 2 of 8 sums are as far: +++ and ---
    assert sign_flip([1, 2, 1]) == pytest.approx(2 / 8)
    # sums of +-3 +-1 +-1: 5, 3, 3, 1, ...; the one that was seen is 3, and 6 of 8 are as far
    assert sign_flip([3, 1, -1]) == pytest.approx(6 / 8)
    assert sign_flip([-1.0] * 10) == pytest.approx(2 / 1024)


def test_what_cannot_be_tested_exactly_is_refused():
    assert sign_flip([2.0]) == 1.0
    for count in (0, 21):
        with pytest.raises(FNSFTError, match="exact test"):
            sign_flip([1.0] * count)


def test_holm_multiplies_by_what_is_left_and_stays_monotone():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_a_ratio_is_equivalent_when_all_of_its_90_percent_interval_makes_no_difference():
    logs = np.log(np.linspace(0.85, 1.2, 2001))
    ratio = Ratio.of_logs(0.0, logs, 5)
    assert ratio.value == 1.0
    assert ratio.narrow == pytest.approx((0.85 + 0.05 * 0.35, 1.2 - 0.05 * 0.35), abs=1e-6)
    assert ratio.interval == pytest.approx((0.85 + 0.025 * 0.35, 1.2 - 0.025 * 0.35), abs=1e-6)
    assert ratio.is_equivalent
    assert not Ratio.of_logs(0.0, np.log(np.linspace(0.7, 1.2, 2001)), 5).is_equivalent
    assert not Ratio.of_logs(0.0, np.log(np.linspace(0.9, 1.4, 2001)), 5).is_equivalent


def test_what_does_not_vary_has_no_width_and_what_is_drawn_is_a_mean():
    seeds = np.array([1.0, 3.0])

    def of_articles(counts):  # both seeds alike: a mean over articles that are 0 and 4
        means = counts @ np.array([0.0, 4.0]) / counts.sum(1)
        return np.repeat(means[:, None], 2, axis=1)

    value, draws = two_way_draws(of_articles, 2, [2], draws=4000)
    assert value == 2.0
    assert set(draws) == {0.0, 2.0, 4.0}  # two articles drawn of two: 1/4, 1/2, 1/4
    assert np.mean(draws == 2.0) == pytest.approx(0.5, abs=0.03)
    value, draws = two_way_draws(lambda counts: np.tile(seeds, (len(counts), 1)), 2, [2], draws=4000)
    assert value == 2.0
    assert np.mean(draws == 1.0) == pytest.approx(0.25, abs=0.03)
    value, draws = two_way_draws(lambda counts: np.full((len(counts), 3), 7.0), 3, [5])
    assert value == 7.0
    assert np.ptp(draws) < 1e-12


def test_the_variances_of_seeds_and_of_articles_add_up():
    generator = np.random.default_rng(1)
    seeds, articles = generator.normal(size=6), generator.normal(size=40)

    def values(counts):
        return (counts @ articles / counts.sum(1))[:, None] + seeds

    value, draws = two_way_draws(values, 6, [40], draws=20000)
    assert value == pytest.approx(seeds.mean() + articles.mean())
    expected = seeds.var() / 6 + articles.var() / 40  # of a mean of n drawn with replacement: population variance / n
    assert math.sqrt(draws.var()) == pytest.approx(math.sqrt(expected), rel=0.03)


def test_the_articles_of_every_text_are_drawn_by_themselves():
    def values(counts):
        assert (counts[:, :3].sum(1) == 3).all()
        assert (counts[:, 3:].sum(1) == 5).all()
        return counts[:, :1]

    assert two_way_draws(values, 1, [3, 5])[0] == 1.0
