"""The metrics of a sequence of tasks, against values worked out by hand."""

import pytest

from fnsft_trl.continual import ScoreMatrix
from fnsft_trl.errors import FNSFTError


def test_three_tasks_by_hand():
    scores = [
        [0.10, 0.20, 0.30],
        [0.80, 0.30, 0.30],
        [0.60, 0.90, 0.20],
        [0.50, 0.70, 0.70],
    ]
    found = ScoreMatrix("abc", scores, {"a": 0.85, "b": 0.85, "c": 0.85}).transfer()
    assert found.average == pytest.approx((0.5 + 0.7 + 0.7) / 3)
    assert found.backward == pytest.approx((-0.3 - 0.2) / 2)
    assert found.forward_to_single == pytest.approx((-0.05 + 0.05 - 0.15) / 3)
    assert found.forward_to_base == pytest.approx((0.1 - 0.1) / 2)
    assert found.forgetting == pytest.approx((0.3 + 0.2) / 2)


def test_negative_transfer_by_hand():
    """The second stage ruins what the base could do of the first task, which its own stage did not help."""
    found = ScoreMatrix("ab", [[0.6, 0.5], [0.4, 0.1], [0.2, 0.3]]).transfer()
    assert found.average == pytest.approx(0.25)
    assert found.backward == pytest.approx(-0.2)
    assert found.forward_to_base == pytest.approx(-0.4)
    assert found.forgetting == pytest.approx(0.4)  # from the base's 0.6
    assert found.forward_to_single is None


def test_later_stages_that_help_forget_nothing():
    found = ScoreMatrix("ab", [[0.0, 0.0], [0.5, 0.2], [0.7, 0.9]]).transfer()
    assert found.backward == pytest.approx(0.2)
    assert found.forgetting == 0


def test_one_stage_has_no_transfer():
    found = ScoreMatrix(["only"], [[0.1], [0.4]], {"only": 0.5}).transfer()
    assert (found.average, found.forward_to_single) == (0.4, pytest.approx(-0.1))
    assert (found.backward, found.forward_to_base, found.forgetting) == (None, None, None)


@pytest.mark.parametrize(
    ("tasks", "scores", "single", "message"),
    [
        ([], [[]], None, "no task"),
        (["a", "a"], [[0, 0]] * 3, None, "stands twice"),
        (["a", "b"], [[0, 0]] * 2, None, "3 rows of 2"),
        (["a", "b"], [[0, 0], [0], [0, 0]], None, "has rows of"),
        (["a", "b"], [[0, 0]] * 3, {"a": 1}, "lack b"),
    ],
)
def test_a_matrix_that_is_none_is_refused(tasks, scores, single, message):
    with pytest.raises(FNSFTError, match=message):
        ScoreMatrix(tasks, scores, single)
