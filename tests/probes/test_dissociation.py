import numpy as np

from fnsft_trl.probes.condition import Condition
from fnsft_trl.probes.dissociation import _permuted, dissociate
from fnsft_trl.probes.statistics import Sums


class Known:
    """What is known of two domains: which network does how much damage on which."""

    def __init__(self, damage, units=40, seed=0):
        random = np.random.default_rng(seed)
        self.data = {"code": None, "wiki": None}
        self._sums = {}
        for name in self.data:
            base = 10 + random.standard_normal(units)
            self._sums[name, "intact"] = Sums(base, np.full(units, 5.0))
            self._sums[name, "full"] = Sums(base + 50, np.full(units, 5.0))
            for label, of_data in damage.items():
                noise = random.standard_normal(units)
                self._sums[name, label] = Sums(base + 5 * of_data[name] + noise, np.full(units, 5.0))
                for draw in range(3):
                    self._sums[name, f"{label}-{draw}"] = Sums(
                        base + random.standard_normal(units), np.full(units, 5.0)
                    )

    def of(self, curve, selector="networks", network=None):
        if curve == "full":
            return [_named("full")]
        return [_named(network)] if selector == "networks" else [_named(f"{network}-{draw}") for draw in range(3)]

    def measures(self, name, key):
        return {"cross_entropy": self._sums[name, key]}


class _named(Condition):
    def __init__(self, key):
        self.__dict__["key"] = key


def test_networks_that_hurt_their_own_domain_are_told_from_those_that_do_not():
    damage = {"code/0": {"code": 3, "wiki": 0.2}, "wiki/0": {"code": 0.2, "wiki": 3}, "wiki/1": {"code": 1, "wiki": 1}}
    damage |= {"code/1": {"code": 2, "wiki": 0.1}}
    own = {label: label.partition("/")[0] for label in damage}
    found = dissociate(Known(damage), own)
    assert found.p["code/0"] < 0.01
    assert found.p["wiki/0"] < 0.01
    assert found.p["wiki/1"] > 0.05
    assert found.advantage["code/0"] > 0.2
    assert found.together < 0.2
    swapped = dissociate(Known(damage), {**own, "code/0": "wiki", "wiki/0": "code"})
    assert swapped.p["code/0"] > 0.9
    assert swapped.together > found.together


def test_the_p_is_that_of_the_advantage_where_sets_are_of_unequal_sizes():
    """The advantage is over the mean of the other sets, each of which counts alike: here 1, of which many sequences of
    one of them would leave 0.05."""
    random = np.random.default_rng(0)
    parts = [mean + 0.3 * random.standard_normal(units) for mean, units in ((0.5, 40), (0.5, 400), (-1.5, 10))]
    assert _permuted(parts, 0, random) < 0.01
    assert _permuted(parts, 2, random) > 0.99


def test_a_domain_that_any_lesion_hurts_more_is_no_advantage():
    known = Known({"code/0": {"code": 1, "wiki": 0}})
    for name, sums in list(known._sums.items()):
        if name[0] == "code" and name[1].startswith("code/0-"):  # random masks do as much there
            known._sums[name] = Sums(sums.values + 5, sums.counts)
    found = dissociate(known, {"code/0": "code"})
    assert abs(found.advantage["code/0"]) < 0.1
    assert found.together is None
