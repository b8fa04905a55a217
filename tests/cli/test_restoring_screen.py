"""Which way `fnsft restore` chooses, of ways with made-up scores."""

import pytest

from fnsft_trl.cli.restoring_screen import Limits, Scored, directions_by_energy, way_named, ways_to_restore
from fnsft_trl.errors import FNSFTError
from fnsft_trl.interventions.restoring import Restoration


def scored(directions, kl, loss, exact=None, **how):
    return Scored(Restoration(directions, **how), mean_kl=kl, loss=loss, exact=exact)


BASE = scored(0, 0.0, 8.0, 0.0, scale=0.0)
WAYS = [
    scored(0, 0.5, 0.2, 0.90),
    scored(2, 0.02, 0.25, 0.88),
    scored(1, 0.01, 0.3, 0.87, is_centred=True),
    scored(10, 0.005, 0.4, 0.80),
    scored(34, 0.001, 1.0, 0.70),
]


def test_it_is_the_least_kl_within_the_tolerance_of_the_loss_and_of_the_exact_answers():
    limits = Limits.of(BASE, WAYS[0], 0.05, rows=100)
    assert (limits.loss, limits.exact) == (pytest.approx(0.2 + 0.05 * 7.8), pytest.approx(0.95 * 0.9))
    assert limits.best(WAYS) is WAYS[1]
    assert Limits.of(BASE, WAYS[0], 0.15, rows=100).best(WAYS) is WAYS[3]
    assert Limits.of(BASE, WAYS[0], 0.0, rows=100).best(WAYS) is WAYS[0]
    assert Limits(0.59, 0.89).best(WAYS) is WAYS[3]  # no way is within both
    assert [Limits(0.59, 0.85).text(WAYS[n]) for n in (1, 3)] == [
        *("task loss at most 0.5900, exact match at least 0.850", "task loss at most 0.5900"),
    ]


def test_exact_answers_count_only_where_the_tolerance_is_a_row_or_more():
    few = Limits.of(BASE, WAYS[0], 0.05, rows=20)
    assert few == Limits(pytest.approx(0.59))
    assert few.best(WAYS) is WAYS[3]
    without = [Scored(way.how, mean_kl=way.mean_kl, loss=way.loss) for way in (BASE, *WAYS)]
    assert Limits.of(without[0], without[1], 0.05, rows=1000).exact is None


def test_the_fewest_directions_that_hold_the_energy_of_all_texts_by_their_shares():
    energy = {"a": {1: 0.1, 2: 0.3, 10: 0.5}, "b": {1: 0.0, 2: 0.1, 10: 0.9}, "task": {1: 0.9, 2: 0.9, 10: 0.9}}
    even, uneven = {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}
    assert directions_by_energy(energy, even, 0.25) == (10, pytest.approx(0.7))
    assert directions_by_energy(energy, uneven, 0.25) == (2, pytest.approx(0.28))
    assert directions_by_energy(energy, even, 0.99) == (10, pytest.approx(0.7))  # all there are


def test_every_way_has_a_name_of_its_own_by_which_it_is_found():
    ways = ways_to_restore([1, 2, 4], [0.7, 0.5], networks="0-3")
    names = [way.name for way in ways]
    assert len(set(names)) == len(names)
    assert all(way_named(name, ways, [0.7, 0.5]) == way for name, way in zip(names[1:], ways[1:], strict=True))
    assert way_named("off position 0, mean; scaled by 0.5", ways, [0.7, 0.5]) == Restoration(2, 0.5)
    assert not any(way.is_centred or way.networks for way in ways_to_restore([1], [0.5], is_lora=False))
    for name in ("off", "as trained"):
        with pytest.raises(FNSFTError, match=rf"choose is '{name}'; the ways are: scaled by 0\.7 \| scaled"):
            way_named(name, ways, [0.7, 0.5])
