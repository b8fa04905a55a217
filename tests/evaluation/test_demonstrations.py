"""Rows after demonstrations."""

import pytest
from helpers import tiny_model, tiny_rows, tiny_tokenizer

from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.demonstrations import with_demonstrations
from fnsft_trl.evaluation.metrics import score_rows
from fnsft_trl.evaluation.rows import EvaluationRow, RowReader


def read(rows):
    reader = RowReader(tiny_tokenizer())
    return [reader.read(row, number) for number, row in enumerate(rows)]


def test_a_row_follows_its_demonstrations_and_only_its_own_tokens_count():
    row = EvaluationRow(7, [1, 2, 3], [False, False, True], (2, 3), [1, 2], "c")
    shown = [EvaluationRow(n, [10 + n, 20 + n], [False, True], (1, 2), [10 + n], "x") for n in range(3)]
    (found,) = with_demonstrations([row], shown, count=3, seed=0)
    before = found.ids[:6]
    assert sorted(before[::2]) == [10, 11, 12]
    assert [b - a for a, b in zip(before[::2], before[1::2], strict=True)] == [10, 10, 10]
    assert found.ids[6:] == row.ids
    assert found.learnt == [False] * 6 + row.learnt
    assert found.answer == (8, 9)
    assert found.first == 8
    assert found.prompt == [*before, 1, 2]
    assert (found.number, found.reference) == (7, "c")


def test_a_row_is_not_shown_before_itself_and_too_few_are_refused():
    rows = read(tiny_rows(6))
    for row, found in zip(rows, with_demonstrations(rows, rows, count=5), strict=True):
        assert len(found.ids) == sum(len(other.ids) for other in rows)
        assert found.ids[-len(row.ids) :] == row.ids
    with pytest.raises(FNSFTError, match="6 demonstrations"):
        with_demonstrations(rows, rows, count=6)


def test_the_loss_is_that_of_the_same_tokens_and_the_draws_are_repeatable():
    rows = read(tiny_rows(12))
    model = tiny_model("llama")
    alone = score_rows(model, rows[:4])
    found = with_demonstrations(rows[:4], rows[4:], count=5, seed=3)
    assert found == with_demonstrations(rows[:4], rows[4:], count=5, seed=3)
    assert found != with_demonstrations(rows[:4], rows[4:], count=5, seed=4)
    after = score_rows(model, found)
    assert [score.tokens for score in after] == [score.tokens for score in alone]
    assert [score.answer_nll for score in after] != [score.answer_nll for score in alone]
    none = with_demonstrations(rows[:4], rows[4:], count=0)
    assert [s.answer_nll for s in score_rows(model, none)] == pytest.approx([s.answer_nll for s in alone])
