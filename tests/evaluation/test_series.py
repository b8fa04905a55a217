import copy
import json

import pytest
import torch
from helpers import TESTS, tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from processes import run_processes

from fnsft_trl import FNSFTError, NeuronTunerConfig
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.series import RetentionSeries, batches


DELTAS = NeuronTunerConfig(neurons={"0": "0-9", "1": "0-39"}, task_type="CAUSAL_LM")
LORA = LoraConfig(target_modules=["up_proj", "q_proj"], r=2, modules_to_save=["lm_head"])


@pytest.fixture(scope="module")
def text(tokenizer):
    return RetentionText.from_texts([row["prompt"] * (1 + n % 3) for n, row in enumerate(tiny_rows(20))], tokenizer)


def move(model, scale=0.3):
    """Change what trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def by_hand(base, trained, text) -> dict[str, float]:
    """Mean NLL of both and mean KL over all predicted tokens, one sequence after the other, in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    for ids in text.sequences:
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for m in (base, trained))
        targets = torch.tensor(ids[1:])[:, None]
        sums += torch.stack([-p.gather(1, targets).sum(), -q.gather(1, targets).sum(), (p.exp() * (p - q)).sum()])
    before, after, kl = (sums / text.tokens).tolist()
    return {"cross_entropy": after, "rise": after - before, "kl": kl}


@pytest.mark.parametrize("config", [DELTAS, LORA], ids=["deltas", "lora"])
def test_an_adapter_is_compared_exactly_with_its_base(config, text):
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), config)
    series = RetentionSeries(text, batch_size=3)
    series.begin(model)
    assert series.kl_kind == "exact"
    assert series.values["rise"] == series.values["kl"] == 0
    move(model)
    assert series.measure(model) == pytest.approx(by_hand(base, model, text), abs=1e-5)
    assert series.values["kl"] > 0.01


def test_nothing_but_the_head_is_read_twice_where_the_head_is_that_of_the_base(text):
    model = get_peft_model(tiny_model("llama"), DELTAS)
    series, passes, heads = RetentionSeries(text, batch_size=100), [], []
    series.begin(model)
    move(model)
    model.get_base_model().model.norm.register_forward_hook(lambda *_: passes.append(1))
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: heads.append(len(args[0])))
    series.measure(model)
    assert (len(passes), heads) == (1, [2 * len(text.sequences)])


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt"])
def test_heads_of_other_families_are_read_so_too(family, text):
    base = tiny_model(family)
    model = get_peft_model(copy.deepcopy(base), NeuronTunerConfig(neurons={"0": "0-39"}, task_type="CAUSAL_LM"))
    series = RetentionSeries(text, batch_size=3)
    series.begin(model)
    move(model)
    assert series.kl_kind == "exact"
    assert series.measure(model) == pytest.approx(by_hand(base, model, text), abs=1e-5)


def test_a_whole_model_is_compared_with_what_is_stored(text):
    """The tiny model has 120 tokens, nearly equally probable, of which 64 are stored: a lower bound."""
    base, model = tiny_model("llama"), tiny_model("llama")
    series = RetentionSeries(text, batch_size=3)
    series.begin(model)
    assert series.kl_kind == "top-k"
    assert series.measure(model) == pytest.approx({"cross_entropy": series.base, "rise": 0, "kl": 0}, abs=1e-6)
    move(model, 0.02)
    found, expected = series.measure(model), by_hand(base, model, text)
    assert found["rise"] == pytest.approx(expected["rise"], abs=1e-5)
    assert 0.5 * expected["kl"] < found["kl"] <= expected["kl"] + 1e-6


def test_a_whole_model_is_compared_exactly_where_that_is_asked_for_and_its_head_does_not_train(text):
    base, model = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(FNSFTError, match="head that is not trained"):
        RetentionSeries(text, exact=True).begin(model)
    model.get_output_embeddings().requires_grad_(False)
    series = RetentionSeries(text, batch_size=3, exact=True)
    series.begin(model)
    move(model, 0.02)
    found, expected = series.measure(model), by_hand(base, model, text)
    assert series.kl_kind == "exact"
    assert found == pytest.approx(expected, abs=1e-5)
    assert sum(series.kl_sums) / text.tokens == pytest.approx(expected["kl"], abs=1e-5)
    assert len(series.kl_sums) == len(text.sequences)
    with pytest.raises(FNSFTError, match="kept in memory"):
        RetentionSeries(text).resume(series.state(), None, model)


def test_the_base_of_an_adapter_that_was_trained_before_is_the_model_with_it(text):
    model = get_peft_model(tiny_model("llama"), DELTAS)
    move(model)
    start = copy.deepcopy(model)
    series = RetentionSeries(text)
    series.begin(model)
    assert series.kl_kind == "top-k"
    move(model, 0.05)
    expected = by_hand(start, model, text)
    assert series.measure(model)["rise"] == pytest.approx(expected["rise"], abs=1e-5)
    assert 0 < series.values["kl"] <= expected["kl"] + 1e-6


def test_measuring_leaves_model_and_mode_as_they_were(text):
    model = get_peft_model(tiny_model("llama"), DELTAS).train()
    move(model)
    before = copy.deepcopy(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    series = RetentionSeries(text)
    series.begin(model)
    series.measure(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_sequences_make_small_batches():
    lengths = [256, 10, 512, 5000, 256, 12, 600]
    found = batches(lengths, 4)
    assert sorted(number for batch in found for number in batch) == list(range(7))
    assert [[lengths[n] for n in batch] for batch in found] == [[10, 12, 256, 256], [512], [600], [5000]]
    assert all(len(batch) * max(lengths[n] for n in batch) <= 4 * 256 or len(batch) == 1 for batch in found)


def test_what_is_stored_comes_back_bit_for_bit(text):
    model = tiny_model("llama")
    series, other = RetentionSeries(text, name="a"), RetentionSeries(text, name="a")
    series.begin(model)
    move(model, 0.02)
    other.resume(series.state(), series.tensors(), model)
    assert other.measure(model) == series.measure(model)


def test_a_base_that_cannot_be_had_is_an_error(text, tokenizer):
    whole, adapter = tiny_model("llama"), get_peft_model(tiny_model("llama"), DELTAS)
    of_adapter, of_whole = RetentionSeries(text, name="a"), RetentionSeries(text, name="a")
    of_adapter.begin(adapter)
    of_whole.begin(whole)
    other = RetentionSeries(RetentionText.from_texts(["Say bako: okab."], tokenizer), name="a")
    with pytest.raises(FNSFTError, match="'a' is not that of the run which is resumed"):
        other.resume(of_adapter.state(), None, adapter)
    with pytest.raises(FNSFTError, match="with its adapter off"):
        RetentionSeries(text, name="a").resume(of_adapter.state(), None, whole)
    stranger = get_peft_model(tiny_model("llama", seed=1), DELTAS)
    with pytest.raises(FNSFTError, match="another base model"):
        RetentionSeries(text, name="a").resume(of_adapter.state(), None, stranger)
    with pytest.raises(FNSFTError, match="not in the checkpoint"):
        RetentionSeries(text, name="a").resume(of_whole.state(), None, whole)


@pytest.mark.slow
def test_three_processes_get_the_numbers_of_one():
    """To the last bit; five batches, so that one process idles in the second round."""
    script = TESTS / "series_run.py"
    (one,), three = run_processes(1, script), run_processes(3, script)
    assert [kind for kind, *_ in json.loads(one)] == ["exact", "top-k"]
    assert three == [one] * 3
