"""Scores and their intervals: a value is that of its library, and draws of rows are the same for both models."""

import math

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from fnsft_trl.evaluation.bootstrap import resampled_sums
from fnsft_trl.evaluation.generation import text_measures
from fnsft_trl.evaluation.measures import Measure
from fnsft_trl.evaluation.retention import RetentionText


ANSWERS = ["The cat sat on the mat.", "a dog runs", "", "Running dogs bark loudly at night, every night.", "ok"]
EXPECTED = ["The cat sat on the mat.", "the dog is running fast", "something", "Dogs that run bark at night.", "OK"]


def test_bleu_and_rouge_are_those_of_their_libraries():
    measures = text_measures(ANSWERS, EXPECTED, range(5))
    assert measures["bleu"].value == sacrebleu.corpus_bleu(ANSWERS, [EXPECTED]).score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(e, a)[name].fmeasure for a, e in zip(ANSWERS, EXPECTED, strict=True)]
        assert measures[name].value == pytest.approx(sum(each) / 5, abs=1e-12)
        assert measures[name].per_row == pytest.approx(each, abs=1e-12)
    assert measures["generated_exact_match"].value == 1 / 5


def test_bleu_of_drawn_rows_is_that_of_their_corpus():
    measure = text_measures(ANSWERS, EXPECTED, range(5))["bleu"]
    chosen = [0, 3, 3, 1, 4]
    drawn = Measure("bleu", measure.rows[chosen], tuple(chosen), rises=True)
    answers, expected = ([texts[number] for number in chosen] for texts in (ANSWERS, EXPECTED))
    assert drawn.value == sacrebleu.corpus_bleu(answers, [expected]).score


def test_the_forms_are_what_their_names_say():
    nll, tokens = [2.0, 5.0, 1.0], [3, 4, 2]
    of = {
        form: Measure.of_sums(nll, tokens, range(3), rises=False, form=form).value for form in ("mean", "perplexity")
    }
    assert of == {"mean": pytest.approx(8 / 9), "perplexity": pytest.approx(math.exp(8 / 9))}
    bits = Measure.of_sums(nll, [10, 20, 10], range(3), rises=False, form="bits").value
    assert bits == pytest.approx(8 / math.log(2) / 40)
    assert Measure.of_sums([1e6], [1], [0], rises=False, form="perplexity").value == math.inf


def test_draws_are_paired_and_repeat_with_their_seed():
    before = Measure.of_rows([float(number % 3 == 0) for number in range(60)], range(60), rises=True)
    after = Measure.of_rows([float(number % 3 != 1) for number in range(60)], range(60), rises=True)
    assert after.minus(before) == after.minus(before)
    assert not torch.equal(resampled_sums(after.rows, seed=1), resampled_sums(after.rows))
    assert before.minus(before) == (0, 0, 0)
    shifted = Measure.of_rows([value + 0.25 for value in before.per_row], range(60), rises=True)
    assert shifted.minus(before) == pytest.approx((0.25, 0.25, 0.25))  # unpaired draws would differ
    value, low, high = after.minus(before)
    assert low < value < high
    assert value == pytest.approx(20 / 60)
    error = (20 / 60 * 40 / 60 / 60) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_only_rows_that_both_have_are_compared():
    before = Measure.of_rows([0.0, 1.0, 1.0], [0, 1, 2], rises=True)
    after = Measure.of_rows([1.0, 1.0, 0.0], [1, 2, 5], rises=True)
    assert after.minus(before) == (0, 0, 0)
    assert after.minus(Measure.of_rows([1.0], [9], rises=True)) is None


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    rows = torch.rand(50, 2, dtype=torch.float64)
    whole = resampled_sums(rows, draws=300)
    monkeypatch.setattr("fnsft_trl.evaluation.bootstrap._AT_ONCE", 700)
    assert torch.equal(resampled_sums(rows, draws=300), whole)


def test_a_rise_of_retention_is_a_paired_bootstrap_over_sequences():
    text = RetentionText.of_sequences([[1] * (3 + number % 5) for number in range(40)])
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([len(ids) - 1 for ids in text.sequences], dtype=torch.float64)
    chosen = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(0))
    samples = (after - before)[chosen].sum(1) / tokens[chosen].sum(1)
    ends = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    expected = [float((after - before).sum() / tokens.sum()), *ends]
    assert text.rise(before, after) == pytest.approx(expected, abs=1e-12)
