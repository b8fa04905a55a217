"""What cells come to: means, intervals, differences."""

import random

import pytest
from scipy import stats

from fnsft_trl.experiments.summary import differing, of_arm, of_pair, over_parts, over_seeds


def cell(arm, seed, nll, rise, *, eval_data="x"):
    """A finished cell of four rows and three texts of ten tokens each."""
    draw = random.Random(f"{arm}{seed}")
    rows = [nll + noise for noise in (0.2, -0.2, 0.1, -0.1)]
    base = [30.0 + draw.random() for _ in range(3)]
    text = {"sha256": "s", "sequence_tokens": [10, 10, 10], "base_nll": base}
    text["nll"] = [before + 10 * rise + noise for before, noise in zip(base, (0.5, -0.5, 0.0), strict=True)]
    last = {"step": 3, "learning": nll, "retention": {"wiki": {"rise": rise, "kl": 2 * rise}, "task": {"kl": 1.0}}}
    return {
        "arm": arm,
        "seed": seed,
        "scores": {"nll": nll, "exact_match": 0.5, "perplexity": 2.0},
        "scored": {"rows": 4, "left_out": 0, "answers": True},
        "masked": None,
        "rows": {"nll": rows, "exact_match": [True, False, True, False]},
        "points": [{"step": 0}, last],
        "retention": {"wiki": text},
        "eval_data": eval_data,
    }


def test_an_interval_over_seeds_is_students():
    values = [0.3, 0.5, 0.4, 0.9]
    low, high = stats.t.interval(0.95, 3, loc=0.525, scale=stats.sem(values))
    found = over_seeds(values)
    assert (found.value, found.low, found.high) == pytest.approx((0.525, low, high))
    assert (found.over, found.n) == ("seeds", 4)


def test_one_seed_has_no_interval_over_seeds():
    found = over_seeds([0.4])
    assert (found.value, found.low, found.high, found.over, found.n) == (0.4, None, None, None, 1)


def test_an_interval_over_parts_holds_their_ratio_and_narrows_with_more_of_them():
    few, many = ([1.0, -1.0, 3.0, 2.0] * count for count in (2, 50))
    first, second = (over_parts(parts, [10.0] * len(parts), "texts") for parts in (few, many))
    assert first.value == second.value == pytest.approx(0.125)
    assert first.low < second.low < 0.125 < second.high < first.high
    assert over_parts([2.0, 2.0], [1.0, 1.0], "rows").low == 2.0


def test_an_arm_of_several_seeds_is_its_mean_with_intervals_over_seeds():
    found = of_arm([cell("a", seed, nll=1.0 + seed, rise=0.1 * seed) for seed in (0, 1, 2)])
    assert found["nll"].value == pytest.approx(2.0)
    assert found["retention"]["wiki"]["rise"].value == pytest.approx(0.1)
    assert found["retention"]["wiki"]["rise"].over == found["nll"].over == "seeds"
    assert set(found["retention"]["task"]) == {"kl"}


def test_an_arm_of_one_seed_has_an_interval_of_its_rise_over_texts():
    found = of_arm([cell("a", 0, nll=1.0, rise=0.1)])
    rise = found["retention"]["wiki"]["rise"]
    assert rise.value == pytest.approx(0.1)
    assert rise.over == "texts"
    assert rise.low < 0.1 < rise.high
    assert found["nll"].low is None


def test_a_difference_is_paired_by_seed():
    """Seeds that move both arms alike move no difference."""
    first = [cell("a", seed, nll=1.0 + seed, rise=0.1) for seed in (0, 1, 2)]
    second = [cell("b", seed, nll=1.5 + seed, rise=0.1) for seed in (0, 1, 2)]
    found = of_pair(first, second)
    assert (found["nll"].value, found["nll"].low, found["nll"].high) == pytest.approx((0.5, 0.5, 0.5))
    assert found["wiki: rise"].value == pytest.approx(0)


def test_a_difference_of_one_seed_is_paired_by_row_and_text():
    found = of_pair([cell("a", 0, nll=1.0, rise=0.1)], [cell("b", 0, nll=1.5, rise=0.3)])
    assert (found["nll"].value, found["nll"].low, found["nll"].over) == (
        pytest.approx(0.5),
        pytest.approx(0.5),
        "rows",
    )
    assert found["wiki: rise"].over == "texts"


def test_arms_that_were_scored_on_other_rows_have_no_difference_of_scores():
    found = of_pair([cell("a", 0, 1.0, 0.1)], [cell("b", 0, 1.5, 0.3, eval_data="y")])
    assert "nll" not in found
    assert "wiki: rise" in found


def test_what_differs_is_what_is_not_given_alike():
    found = differing({"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": None}})
    assert found == {"y": {"a": 2, "b": 3, "c": 2}, "z": {"c": None}}
