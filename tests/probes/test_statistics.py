import numpy as np
import pytest

from fnsft_trl.evaluation.bootstrap import Interval
from fnsft_trl.probes.found import in_words, is_degenerate
from fnsft_trl.probes.statistics import LEVEL, Sums, compare, p_of_draws


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("count", [1, 10])
def test_one_more_draw_is_called_stronger_no_more_often_than_is_stated(kind, count):
    """Over 200 probes without structure, in which every network is one more draw of its control."""
    random = np.random.default_rng(0)
    drawn_from = {
        "normal": random.standard_normal,
        "heavy": lambda size: random.standard_t(2, size),
        "skewed": lambda size: random.lognormal(0, 1.2, size),
    }[kind]
    wrong, trials = 0, 200
    for _ in range(trials):
        scales = random.lognormal(0, 1, count)
        values = {str(n): scales[n] * drawn_from(21) for n in range(count)}
        networks = {n: Sums(np.array([v[0]]), np.ones(1)) for n, v in values.items()}
        controls = {n: [Sums(np.array([x]), np.ones(1)) for x in v[1:]] for n, v in values.items()}
        wrong += any(c.is_stronger for c in compare(networks, controls, "random", draws=10).values())
    assert wrong / trials <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / trials) ** 0.5
    assert wrong  # it can be wrong at all


def test_twenty_draws_can_tell_and_nineteen_cannot():
    random = np.random.default_rng(1)
    for count in (1, 10, 64):
        for draws, can in ((20, True), (19, False)):
            drawn = {str(n): random.standard_normal(draws) for n in range(count)}
            smallest = min(p_of_draws(dict.fromkeys(drawn, 1e6), drawn).values())
            assert (smallest * count < LEVEL) is can


def test_an_interval_holds_the_difference_over_units_and_draws():
    random = np.random.default_rng(2)
    counts = np.full(40, 10.0)
    network = Sums(counts * 2 + random.standard_normal(40), counts)
    controls = [Sums(counts * (0.5 + 0.1 * random.standard_normal()), counts) for _ in range(20)]
    found = compare({"0": network}, {"0": controls}, "random")["0"]
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.difference == pytest.approx(1.5, abs=0.1)
    assert found.is_stronger
    few = compare({"0": network}, {"0": controls[:2]}, "random")["0"]
    assert few.p is None


def test_draws_that_all_networks_have_give_no_p():
    """Ten times the same five effects are no fifty draws: their p could be under 0.02."""
    drawn = [Sums(np.full(30, 0.1 * n), np.ones(30)) for n in range(5)]
    networks = {str(n): Sums(np.full(30, 5.0), np.ones(30)) for n in range(10)}
    found = compare(networks, dict.fromkeys(networks, drawn), "surrogate", are_shared=True)
    assert {each.p for each in found.values()} == {None}
    assert all(each.is_stronger for each in found.values())  # by the interval
    (alone,) = compare({"0": networks["0"]}, {"0": drawn}, "surrogate", are_shared=True).values()
    assert alone.p == 1 / 6


def test_a_verdict_says_what_was_found():
    def beside(stronger, draws=20):
        values = {"0": Sums(np.full(30, 10.0 if stronger else 0.0), np.ones(30))}
        drawn = {"0": [Sums(np.full(30, 0.1 * n), np.ones(30)) for n in range(draws)]}
        return compare(values, drawn, "random")["0"]

    rise = Interval(1.0, 0.5, 1.5)
    assert "no damage" in in_words(Interval(0.1, -0.1, 0.3), {})
    assert "too few" in in_words(rise, {"random": beside(True, 5), "rms_matched": beside(True, 5)})
    assert "may be chance" in in_words(rise, {"random": beside(False), "rms_matched": beside(True)})
    assert "may be loudness" in in_words(rise, {"random": beside(True), "rms_matched": beside(False)})
    assert in_words(rise, {"random": beside(True), "rms_matched": beside(True)}).startswith(
        "stronger than random neurons and than neurons of the same amplitude"
    )


@pytest.mark.parametrize("text", ["", " ... !", "no no no no no no no no no", "aaaaaaaaaaaaaaaaaaaa"])
def test_outputs_that_are_no_text(text):
    assert is_degenerate(text)


@pytest.mark.parametrize("text", ["yes", "The cat sat on the mat, and the dog saw it.", "42"])
def test_outputs_that_are_text(text):
    assert not is_degenerate(text)
