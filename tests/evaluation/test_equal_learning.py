"""Equal learning, against values worked out by hand."""

import math

import numpy as np
import pytest

from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.equal_learning import LEAST_KL, Crossing, kl_at, target


def test_a_target_is_a_share_of_what_only_training_teaches():
    assert target(3.0, 1.0, 0.5) == 2.0
    assert target(3.0, 1.0, 0.9) == pytest.approx(1.2)
    assert target(3.0, 1.0, 1.0) == 1.0


@pytest.mark.parametrize(("arguments", "said"), [((1.0, 1.0, 0.5), "nothing that only"), ((3.0, 1.0, 0.0), "share")])
def test_a_target_that_means_nothing_is_refused(arguments, said):
    with pytest.raises(FNSFTError, match=said):
        target(*arguments)


def test_log_kl_is_linear_in_the_loss_between_neighbours():
    # 1.5 lies three quarters of the way from 3 to 1, so KL is .01 ^ .25 * .16 ^ .75 = .08
    assert kl_at([8.0, 3.0, 1.0, 0.5], [0.0, 0.01, 0.16, 1.0], 1.5) == pytest.approx(0.08)


def test_a_point_on_the_target_has_its_own_kl():
    assert kl_at([8.0, 3.0, 1.0], [0.0, 0.01, 0.16], 3.0) == pytest.approx(0.01)


def test_from_the_base_kl_grows_with_the_square_of_what_was_learnt():
    # halfway from 8 to 2: a quarter of the KL
    assert kl_at([8.0, 2.0], [0.0, 0.4], 5.0) == pytest.approx(0.1)


def test_losses_that_rise_again_are_pooled_and_the_first_crossing_counts():
    # 2, 3 -> 2.5, 2.5; so 2.75 lies at .25 / 1.5 of the way from 4 to 2.5
    crossing = Crossing.find([4.0, 2.0, 3.0, 1.0], 2.75)
    assert (crossing.before, crossing.share, crossing.least) == (0, pytest.approx(1.25 / 1.5), 1.0)
    later = Crossing.find([4.0, 2.0, 3.0, 1.0], 1.75)
    assert (later.before, later.share) == (2, pytest.approx(0.5))
    assert math.exp(later.log_kl(np.array([0, 0.1, 0.2, 0.8]))) == pytest.approx(0.4)


def test_a_target_that_is_never_reached_is_said_and_has_no_kl():
    crossing = Crossing.find([4.0, 2.0, 1.5], 1.0)
    assert not crossing.is_reached
    assert crossing.least == 1.5
    assert kl_at([4.0, 2.0, 1.5], [0.0, 0.1, 0.2], 1.0) is None
    with pytest.raises(FNSFTError, match="never reaches"):
        crossing.log_kl(np.zeros(3))


def test_a_base_that_has_learnt_enough_and_a_path_without_a_trained_model_are_refused():
    with pytest.raises(FNSFTError, match="without any training"):
        Crossing.find([1.0, 0.5], 2.0)
    with pytest.raises(FNSFTError, match="points"):
        Crossing.find([1.0], 0.5)


def test_many_series_are_read_at_the_same_place_and_rounding_has_no_logarithm():
    crossing = Crossing.find([4.0, 2.0, 1.0], 1.5)
    logs = crossing.log_kl(np.array([[0, 0], [0.01, -1e-9], [0.04, 1e-12]]))
    assert np.exp(logs) == pytest.approx([0.02, LEAST_KL])
