"""NaN and infinity: what is told of a model, or by a number, is an error or no number, never a value or a pass."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import random_mask, tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from fnsft_trl import (
    FNSFTError,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    SelectorEvidence,
    constrain_lora,
    discover_networks,
    select_neurons,
)
from fnsft_trl.comparison.fingerprint import network_time_courses
from fnsft_trl.comparison.samples import compare_samples
from fnsft_trl.comparison.similarity import compare_time_courses
from fnsft_trl.continual.transfer import ScoreMatrix
from fnsft_trl.data.choices import ChoiceRow
from fnsft_trl.discovery.directions import KeptDirections, KeptText
from fnsft_trl.evaluation.bootstrap import difference, spread
from fnsft_trl.evaluation.choices import choice_measures, score_choices
from fnsft_trl.evaluation.equal_learning import Crossing, kl_at
from fnsft_trl.evaluation.evaluation import EvaluationConfig, EvaluationData, evaluate_model
from fnsft_trl.evaluation.general import score_text
from fnsft_trl.evaluation.generation import generate_answers
from fnsft_trl.evaluation.kl import TopDistributions, divergences
from fnsft_trl.evaluation.measures import Measure
from fnsft_trl.evaluation.metrics import score_completions
from fnsft_trl.evaluation.paired import Ratio, holm, sign_flip
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.rows import EvaluationRow
from fnsft_trl.evaluation.series import RetentionSeries
from fnsft_trl.experiments.cells import Cells
from fnsft_trl.experiments.summary import over_seeds
from fnsft_trl.export import to_merged
from fnsft_trl.export.restored import AdapterChanges
from fnsft_trl.export.restored_model import ModelChanges
from fnsft_trl.export.verification import Verification, _wrong
from fnsft_trl.finite import check_entries, largest, without_nan
from fnsft_trl.interventions.restoring import LoraChange, RowsChange
from fnsft_trl.probes.data import ProbeData
from fnsft_trl.probes.examples import find_examples
from fnsft_trl.probes.records import Records
from fnsft_trl.probes.singles import first_order_effects
from fnsft_trl.probes.statistics import Sums, p_of_draws
from fnsft_trl.report import Report
from fnsft_trl.template.description import NullReliability, reliability_above_null
from fnsft_trl.training.budget import Budget
from fnsft_trl.training.earlier_answers import distillation
from fnsft_trl.training.elastic import fisher_diagonal, trained_parameters
from fnsft_trl.tuner.saved import SavedAdapter


ROWS = tiny_rows(6)
TEXTS = [row["prompt"] + row["completion"] for row in ROWS]
LONG = [" ".join(TEXTS)] * 4
IDS = [[5, 6, 7, 8, 9], [9, 8, 7]]
NAN, INF = math.nan, math.inf


def damaged(where: str) -> torch.nn.Module:
    model = tiny_model("llama")
    if where == "head":
        model.lm_head.weight.data[5] = NAN
    elif where == "infinite":
        model.lm_head.weight.data[5, 3] = INF
    elif where == "mlp":
        model.model.layers[1].mlp.up_proj.weight.data[3, 2] = NAN
    elif where == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
        next(p for name, p in model.named_parameters() if "lora_B" in name).data[3, 2] = NAN
    else:  # float16, whose largest number is 65,504
        for module in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            module.weight.data.mul_(1e4)
        model = model.half()
    return model.eval()


def text() -> RetentionText:
    return RetentionText.of_sequences(IDS)


def evaluate(model, tokenizer, rows, **settings):
    return evaluate_model(model, tokenizer, [EvaluationData("d", rows)], EvaluationConfig(**settings))


def evidence(model, tokenizer):
    return SelectorEvidence(model, tokenizer, task=TEXTS, general=LONG)


def fisher(model, tokenizer, template):
    rows = [EvaluationRow(0, [5, 6, 7], [False, True, True], (1, 3), [5], "")]
    return fisher_diagonal(model, rows, trained_parameters(model.float().requires_grad_(True)))


def singles(model, tokenizer, template):
    data = ProbeData.read(EvaluationData("d", ROWS), tokenizer, EvaluationConfig(), max_tokens=99, max_length=64)
    return first_order_effects(model, [data], site="mlp_intermediate", layers=[0, 1, 2], batch_size=4)


EVERYWHERE, INSIDE = ("head", "infinite", "mlp", "adapter", "overflow"), ("mlp", "adapter", "overflow")
OF_MODELS = {
    "answers": (EVERYWHERE, lambda m, t, n: evaluate(m, t, ROWS)),
    "text": (EVERYWHERE, lambda m, t, n: evaluate(m, t, [{"text": text} for text in TEXTS])),
    "choices": (EVERYWHERE, lambda m, t, n: score_choices(m, t, [ChoiceRow(0, "Say ba:", (" ab.", " ko."), 0)])),
    "completions": (EVERYWHERE, lambda m, t, n: score_completions(m, t, ROWS)),
    "generation": (EVERYWHERE, lambda m, t, n: generate_answers(m, t, IDS, max_new_tokens=2)),
    "general text": (EVERYWHERE, lambda m, t, n: score_text(m, text())),
    "reference": (EVERYWHERE, lambda m, t, n: score_text(tiny_model("llama"), text(), reference=m)),
    "retention": (EVERYWHERE, lambda m, t, n: RetentionSeries(text()).begin(m)),
    "first order": (EVERYWHERE, singles),
    "conflict": (EVERYWHERE, lambda m, t, n: select(n, "gradient_conflict", evidence(m, t))),
    "fisher": (EVERYWHERE[:4], fisher),
    "contrast": (INSIDE, lambda m, t, n: select(n, "contrast", evidence(m, t))),
    "discovery": (INSIDE, lambda m, t, n: discover_networks(m, t, LONG, FunctionalNetworkConfig(ica_components=2))),
    "examples": (INSIDE, lambda m, t, n: find_examples(m, t, n, {"a": TEXTS}, count=1)),
    "time courses": (INSIDE, lambda m, t, n: network_time_courses(m, t, n, TEXTS)),
    "samples": (INSIDE, lambda m, t, n: compare_samples(m, t, n, LONG, count=2)),
    "directions": (
        INSIDE,
        lambda m, t, n: KeptDirections.find(m, ["model.layers.2.mlp.up_proj"], {"a": KeptText(IDS)}, leading=1),
    ),
}


def select(template, selector, of=None):
    return select_neurons(template, selector=selector, fraction=0.2, evidence=of)


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name, (places, _) in OF_MODELS.items() for where in places]
)
def test_nothing_is_told_of_a_model_that_gives_no_numbers(name, where, tokenizer, templates):
    model = damaged(where)
    with pytest.raises(FNSFTError, match=r"NaN|nan|inf") as error:
        OF_MODELS[name][1](model, tokenizer, templates["llama"])
    assert "ica_" not in str(error.value)  # which would be the reason of another refusal


def matrix(value):
    return [[0.1, 0.2], [0.5, value], [0.4, 0.6]]


def told_by_cells(value, path):
    cells = Cells(path / "cells.jsonl")
    cells.add({"arm": "a", "seed": 0, "points": [{"retention": {"wiki": {"rise": value}}}]})


def told_by_records(value, path):
    records = Records(path, {})
    scores = {"nll": [value, 1.0], "kl": [0.0, 0.0], "exact": [0, 0]}
    records.add("d", 0, "key", scores, seconds=0.0, share=1.0)


BY_NUMBERS = {
    "holm": lambda value, _: holm({"a": 0.01, "b": value}),
    "sign flip": lambda value, _: sign_flip([0.1, value, 0.3]),
    "ratio": lambda value, _: Ratio.of_logs(0.0, np.array([0.0, value]), 2),
    "crossing": lambda value, _: Crossing.find([3.0, value, 1.0], 2.0),
    "kl at": lambda value, _: kl_at([3.0, 1.0], [0.0, value], 2.0),
    "sums": lambda value, _: Sums(np.array([1.0, value]), np.array([1.0, 1.0])),
    "effect": lambda value, _: p_of_draws({"a": value}, {"a": np.arange(20.0)}),
    "draws": lambda value, _: p_of_draws({"a": 1.0}, {"a": np.array([0.1, 0.2, 0.3, value])}),
    "scores": lambda value, _: ScoreMatrix(["a", "b"], matrix(value)),
    "single": lambda value, _: ScoreMatrix(["a", "b"], matrix(0.5), {"a": value, "b": 0.1}),
    "time courses": lambda value, _: compare_time_courses(torch.tensor([[1.0, 2, value]]), torch.rand(1, 3)),
    "cells": told_by_cells,
    "records": told_by_records,
    "entries": lambda value, _: check_entries({"a": [1, {"b": (2.0, value)}]}, "values", "look"),
}


def ruling_out(*tokens: int) -> torch.nn.Module:
    """A model that gives some tokens no probability."""
    model, none = tiny_model("llama"), torch.tensor(tokens)
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, none, -INF))
    return model.eval()


def test_a_token_of_the_text_that_a_model_rules_out_makes_its_loss_infinite_and_no_error(tokenizer):
    """Which is the truth of such a model; of a token that is not of the text nothing is to be told."""
    ids = tokenizer(TEXTS[0]).input_ids
    other = next(token for token in range(5, len(tokenizer)) if token not in ids)
    of = {where: ruling_out(token) for where, token in (("text", ids[3]), ("none", other))}
    plain = evaluate(tiny_model("llama").eval(), tokenizer, [{"text": TEXTS[0]}])
    for where, value in (("text", INF), ("none", pytest.approx(plain.measures["d/bits_per_byte"].value, rel=0.1))):
        found = evaluate(of[where], tokenizer, [{"text": TEXTS[0]}] * 3)
        assert found.measures["d/bits_per_byte"].value == value
        assert found.measures["d/bits_per_byte"].interval(draws=9) == (value,) * 3
        assert found.measures["d/perplexity"].minus(plain.measures["d/perplexity"], draws=9).value == (
            INF if value == INF else pytest.approx(0, abs=9)
        )
    ruled_out, whole = ruling_out(IDS[0][2]), tiny_model("llama").eval()
    assert {n: m.value for n, m in score_text(ruled_out, text(), reference=whole).items()} == {
        "cross_entropy": INF,
        "kl": INF,
    }
    assert all(0 < m.value < INF for m in score_text(whole, text(), reference=ruled_out).values())
    answers = [ChoiceRow(0, "Say ba:", (" ab.", " ko."), 0)]
    assert score_choices(ruling_out(*range(len(tokenizer) // 2)), tokenizer, answers) == [[-INF, -INF]]
    assert [m.value for m in choice_measures(answers, [[-INF, -INF]]).values()] == [0, 0, 0]  # none is the likeliest
    assert [m.value for m in choice_measures(answers, [[-9.0, -INF]]).values()] == [1, 1, 1]


def test_no_difference_is_told_from_a_base_that_rules_out_a_token_of_the_text():
    with pytest.raises(FNSFTError, match=r"the base on the retention text.*is inf.*rules out"):
        RetentionSeries(text()).begin(ruling_out(IDS[0][2]))
    series = RetentionSeries(text())
    series.begin(model := tiny_model("llama"))
    none = torch.tensor([IDS[0][2]])
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, none, -INF))
    assert series.measure(model)["rise"] == INF
    assert Budget(1.0, "stop").passed_by([series]) == [series]


@pytest.mark.parametrize(
    "loss", [lambda before, now: distillation(before, now, 2.0), lambda before, now: divergences(before, now).mean()]
)
def test_a_token_that_both_models_rule_out_adds_nothing_to_a_loss_nor_to_its_gradient(loss):
    before, now = torch.tensor([[0.5, -INF, 1.0]]), torch.tensor([[0.3, -INF, 0.2]], requires_grad=True)
    others = now.detach()[:, [0, 2]].requires_grad_()
    found, expected = loss(before, now), loss(before[:, [0, 2]], others)
    assert float(found) == pytest.approx(float(expected))
    found.backward()
    expected.backward()
    assert now.grad[0].tolist() == pytest.approx([float(others.grad[0, 0]), 0, float(others.grad[0, 1])])
    assert math.isnan(loss(torch.tensor([[0.5, NAN, 1.0]]), now))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_nothing_is_told_by_what_is_no_number(name, value, tmp_path):
    with pytest.raises((FNSFTError, ValueError), match=r"nan|NaN|inf") as error:
        BY_NUMBERS[name](value, tmp_path)
    assert name == "records" or isinstance(error.value, FNSFTError)  # of which a probe tells before they are added
    assert list(tmp_path.iterdir()) == []


def test_a_target_may_be_out_of_reach_but_not_nan():
    assert not Crossing.find([3.0, 1.0], -INF).is_reached
    with pytest.raises(FNSFTError, match="NaN"):
        Crossing.find([3.0, 1.0], NAN)


def change(value):
    return LoraChange(torch.tensor([[1.0, value]]), torch.ones(2, 1))


BASIS = torch.eye(2, dtype=torch.float64)[:, :1]
NO_NUMBERS = {
    "perplexity": lambda: Measure.of_sums([NAN, 1.0], [2, 2], [0, 1], rises=False, form="perplexity").value,
    "interval of infinite ones": lambda: spread(lambda sums: float(sums[0] - sums[0]), torch.tensor([[INF]])).low,
    "interval": lambda: spread(lambda sums: float(sums[0]), torch.tensor([[1.0], [NAN]])).low,
    "difference": lambda: difference(lambda s: float(s[0]), torch.ones(2, 1), torch.tensor([[1.0], [NAN]])).value,
    "mean over seeds": lambda: over_seeds([1.0, NAN]).value,
    "interval over seeds": lambda: over_seeds([1.0, NAN]).low,
    "reliability": lambda: reliability_above_null(NAN, NullReliability(0.1, 0.1)),
    "null": lambda: reliability_above_null(0.5, NullReliability(NAN, 0.1)),
    "left of a LoRA": lambda: change(NAN).left_in(BASIS)[1],
    "left of rows": lambda: RowsChange(torch.tensor([[NAN, 1.0]])).left_in(BASIS)[0],
    "largest": lambda: largest([0.1, NAN, 3.0]),
    "kl": lambda: divergences(torch.zeros(1, 8), torch.full((1, 8), NAN))[0],
    "kl of a base": lambda: divergences(torch.full((1, 8), NAN), torch.zeros(1, 8))[0],
    "top": lambda: TopDistributions.of(torch.zeros(1, 99)).divergences(torch.full((1, 99), NAN))[0],
    "top of a base": lambda: TopDistributions.of(torch.full((1, 99), NAN)).divergences(torch.zeros(1, 99))[0],
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_comes_of_nan_is_nan(name):
    assert math.isnan(NO_NUMBERS[name]())


@pytest.fixture(scope="module")
def broken(tmp_path_factory, model_dir):
    """A folder with a saved LoRA and saved neuron deltas, each with one tensor of NaN in layer 1."""
    root = tmp_path_factory.mktemp("broken")
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    deltas = NeuronTunerConfig(neurons={"1": "0-3"}, task_type="CAUSAL_LM")
    for name, config in (("lora", lora), ("deltas", deltas)):
        model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.data.fill_(1.0)
        next(p for name, p in reversed(trained.items()) if ".layers.1." in name).data.fill_(NAN)
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["lora", "deltas"])
def test_a_broken_adapter_is_not_merged(name, broken, tmp_path):
    with pytest.raises(FNSFTError, match=r"does not merge: .*broken"):
        to_merged(broken / name, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["lora", "deltas"])
def test_a_broken_adapter_is_neither_restored_nor_held_to_neurons(name, broken, model_dir):
    saved = SavedAdapter.read(broken / name)
    with pytest.raises(FNSFTError, match="NaN or infinite entries"):
        AdapterChanges.read(saved, base=str(model_dir))
    if name == "lora":
        model = saved.load_onto(saved.load_base(str(model_dir)))
        model.set_adapter("default")
        with pytest.raises(FNSFTError, match="already changes neurons"):
            constrain_lora(model, random_mask(model, "mlp_intermediate"))


def test_a_broken_fine_tune_is_not_restored():
    tuned = tiny_model("llama")
    tuned.model.layers[0].mlp.up_proj.weight.data[0, 0] = NAN
    with pytest.raises(FNSFTError, match=r"the fine-tuned model holds .*up_proj\.weight, which has NaN"):
        ModelChanges(tiny_model("llama"), tuned)


def test_an_export_with_logits_that_are_no_numbers_is_not_verified():
    found = Verification(NAN, 1e-4, "base", None, 0)
    assert "differ by nan" in _wrong(found, {"tokens": [], "others": [], "own": False}, None)


def test_a_series_that_gives_no_number_passes_its_budget_and_is_no_base_of_another_run():
    model = tiny_model("llama")
    series = RetentionSeries(text())
    series.begin(model)
    state = series.state()
    model.lm_head.weight.data[5] = NAN
    assert math.isnan(series.measure(model)["rise"])
    assert Budget(1.0, "stop").passed_by([series]) == [series]
    adapted = get_peft_model(model, NeuronTunerConfig(neurons={"0": "0-3"}))
    with pytest.raises(FNSFTError, match="has a cross-entropy of nan"):
        RetentionSeries(text()).resume(state | {"kl": "exact"}, None, adapted)


def test_a_report_is_json_for_everyone(tmp_path):
    Report("r").save(tmp_path, {"a": NAN, "b": [INF, {"c": (-INF, 2.0)}], "d": "nan"})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found == {"a": None, "b": [None, {"c": [None, 2.0]}], "d": "nan"}
    assert without_nan({"a": 1.5, "b": [True, 2]}) == {"a": 1.5, "b": [True, 2]}
