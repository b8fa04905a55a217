"""EWC, LwF and O-LoRA: the losses and gradients that their papers say, by hand and in every way of training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import medium_model, sft_config, state, tiny_model
from peft import LoraConfig, get_peft_model
from processes import run_processes
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, NeuronMask, PenaltyConfig
from fnsft_trl.constraints import FrozenSlices, freeze_neurons
from fnsft_trl.evaluation.rows import EvaluationRow
from fnsft_trl.training.earlier_answers import distillation
from fnsft_trl.training.elastic import ElasticWeights, fisher_diagonal, with_task
from fnsft_trl.training.orthogonal import OrthogonalFactors, lora_factors


@pytest.fixture
def earlier(tmp_path, rows):
    (tmp_path / "earlier.jsonl").write_text("\n".join(json.dumps(row) for row in rows[20:28]))
    return f"earlier={tmp_path / 'earlier.jsonl'}"


@pytest.fixture
def make(rows, tokenizer, templates, tmp_path):
    def make(name="out", *, method=None, model=None, penalties=None, lora=None, **args):
        held = method not in (None, "plain")
        config = FunctionalNetworkConfig(train_method=method) if held else None
        lora = LoraConfig(r=2, target_modules=["up_proj", "down_proj"]) if method == "lora" or lora else None
        return FNSFTTrainer(
            model=tiny_model("llama") if model is None else model,
            args=sft_config(tmp_path / name, **args),
            train_dataset=Dataset.from_list(rows[:12]),
            processing_class=tokenizer,
            peft_config=lora,
            penalties=penalties and PenaltyConfig(**penalties),
            network_config=config,
            network_template=templates["llama"] if held else None,
        )

    return make


class Table(nn.Module):
    """A model of two tokens whose logits are its parameter, whatever it reads."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def row(ids, learnt):
    return EvaluationRow(0, ids, learnt, None, [], "")


def test_fisher_information_is_that_worked_out_by_hand():
    """q = (1/4, 3/4). A row that learns token 1 twice: the gradient of log p is 2 (e_1 - q) = (-1/2, 1/2). One that
    learns token 0: e_0 - q = (3/4, -3/4). The mean of the squares is ((1/4 + 9/16) / 2) = 13/32, twice."""
    model = Table([0.25, 0.75])
    rows = [row([0, 1, 1], [False, True, True]), row([1, 1, 0], [False, False, True])]
    found = fisher_diagonal(model, rows, dict(model.named_parameters()))
    torch.testing.assert_close(found["logits"], torch.tensor([13 / 32, 13 / 32]))


def test_ewc_is_the_sum_of_the_penalties_of_all_tasks_with_its_gradient():
    """Two tasks: F_1 = (1, 2) about (0, 0), F_2 = (3, 0) about (1, 1); at t = (2, 1) and w = 10 the penalties are
    5 (1 * 4 + 2 * 1) = 30 and 5 (3 * 1) = 15, their gradient 10 (1 * 2 + 3 * 1, 2 * 1) = (50, 20)."""
    model = nn.Linear(2, 1, bias=False)
    elastic = _elastic(10.0)
    for center, fisher in (((0.0, 0.0), (1.0, 2.0)), ((1.0, 1.0), (3.0, 0.0))):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([center]))
        task = dict(model.named_parameters()), {"weight": torch.tensor([fisher])}
        elastic.fisher, elastic.center = with_task(elastic.fisher, elastic.center, *task)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
    penalty = elastic.add_gradient(model, 1.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[50.0, 20.0]]))
    # The one square that is kept differs from their sum by a constant: (3/4) w / 2 at the first weight.
    assert penalty == pytest.approx(45 - 5 * 3 / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_ewc_pulls_to_the_centre_that_it_has(dtype):
    """c = 1.001 lies between two numbers of half precision, and F = 1e-9 is 0 in float16: the gradient is
    1e9 * 1e-9 * (1 - 1.001), and the penalty 1e9 / 2 * 1e-9 * .001^2."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1)
    elastic = _elastic(1e9)
    elastic.fisher, elastic.center = {"weight": torch.tensor([[1e-9]])}, {"weight": torch.tensor([[1.001]])}
    assert elastic.add_gradient(model, 1.0) == pytest.approx(5e-7, rel=1e-3)
    assert float(model.weight.grad) == pytest.approx(-1e-3, rel=5e-3)


def test_fisher_information_that_is_no_number_is_refused():
    elastic = _elastic(1.0)
    elastic._saved = ({"w": torch.tensor([math.nan])}, {"w": torch.tensor([0.0])})
    with pytest.raises(FNSFTError, match="what is saved of w has NaN"):
        elastic._take({"w": nn.Parameter(torch.zeros(1))})


def test_the_centre_is_between_those_of_the_tasks_however_small_the_fisher_information_is():
    """F_1 = F_2 = 1e-20 about 1 and 3: c = 2; below 1e-30 a task counts for nothing."""
    parameter = {"w": nn.Parameter(torch.tensor([3.0, 3.0]))}
    fisher, center = {"w": torch.tensor([1e-20, 1e-36])}, {"w": torch.tensor([1.0, 1.0])}
    found, mean = with_task(fisher, center, parameter, {"w": torch.tensor([1e-20, 1e-37])})
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 3.0]))
    assert found["w"].tolist() == [pytest.approx(2e-20), 0.0]


MEASURED = """
import os
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from accelerate import PartialState
from fnsft_trl.training import elastic

PartialState(cpu=True)
rank = int(os.environ["RANK"])
elastic.fisher_diagonal = lambda *_: {"w": torch.full((2,), 1.0 + rank)}
trainer = SimpleNamespace(
    model=torch.nn.Linear(2, 1),
    args=SimpleNamespace(disable_tqdm=True),
    is_world_process_zero=lambda: rank == 0,
    compute_loss_context_manager=nullcontext,
)
print(elastic._measured(trainer, [], {}, "")["w"].tolist())
"""


@pytest.mark.slow
def test_all_processes_have_the_same_fisher_information():
    assert run_processes(2, "-c", MEASURED) == ["[1.0, 1.0]\n"] * 2


DEALT = """
import json, sys
from pathlib import Path
import torch
from datasets import Dataset
from helpers import medium_model, sft_config, state, tiny_rows, tiny_tokenizer
from peft import LoraConfig
from safetensors.torch import save_file
from fnsft_trl import FNSFTTrainer, PenaltyConfig

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
for method, penalties in json.loads(sys.argv[3]).items():
    args = sft_config(
        folder / method, per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2, learning_rate=1e-3
    )
    trainer = FNSFTTrainer(
        model=medium_model(torch.float64),
        args=args,
        train_dataset=Dataset.from_list(tiny_rows()[:12]),
        processing_class=tiny_tokenizer(),
        peft_config=None if method == "full" else LoraConfig(r=2, target_modules=["up_proj", "down_proj"]),
        penalties=PenaltyConfig(**penalties),
    )
    assert args.world_size == processes
    trainer.train()
    logged = {n: [e[n] for e in trainer.state.log_history if n in e] for n in ("ewc", "lwf", "olora")}
    (folder / f"{method}-{processes}-{args.process_index}.json").write_text(json.dumps(logged))
    save_file(state(trainer.model), folder / f"{method}-{processes}-{args.process_index}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_are_held_as_one_is(earlier, tmp_path):
    """In float64, with rows of many lengths dealt to them: to the same weights, and the same numbers in the log."""
    adapter, base = tmp_path / "earlier", medium_model()
    base.name_or_path = "another"
    lora = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(adapter)
    held = {"ewc": 50.0, "ewc_datasets": [earlier], "ewc_rows": 2, "lwf": 3.0}
    asked = {"full": held, "lora": {"lwf": 3.0, "olora": 5.0, "olora_adapters": [str(adapter)]}}
    for processes in (1, 2):
        run_processes(processes, "-c", DEALT, tmp_path, processes, json.dumps(asked))
    for method in asked:
        one = load_file(tmp_path / f"{method}-1-0.safetensors")
        logged = json.loads((tmp_path / f"{method}-1-0.json").read_text())
        assert len(logged["lwf"]) == 4
        for rank in (0, 1):
            two = load_file(tmp_path / f"{method}-2-{rank}.safetensors")
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
            for name, values in json.loads((tmp_path / f"{method}-2-{rank}.json").read_text()).items():
                assert values == pytest.approx(logged[name], rel=1e-4)


def _elastic(weight):
    elastic = ElasticWeights(PenaltyConfig(ewc_save=True))
    elastic.weight = weight
    return elastic


def test_lwf_is_the_formula_written_out_with_its_gradient():
    """y = (0.8, 0.2), z = (0.5, 0.5), T = 2: y' = (2/3, 1/3), z' = (1/2, 1/2)."""
    before, now = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    loss = distillation(before, now, 2.0)
    assert float(loss.detach()) == pytest.approx(-(2 / 3 * math.log(1 / 2) + 1 / 3 * math.log(1 / 2)))
    loss.backward()
    torch.testing.assert_close(now.grad, torch.tensor([[(1 / 2 - 2 / 3) / 2, (1 / 2 - 1 / 3) / 2]]))


class Factor(nn.Module):
    """One module with a LoRA whose rows are given."""

    def __init__(self, rows):
        super().__init__()
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.tensor(rows))})


def test_olora_is_the_sum_of_squared_products_with_its_gradient():
    """A_1 = (1, 0), A_2 = (1, 1) and A_t = (2, 1): products 2 and 3, w (4 + 9); gradient 2 w (2 A_1 + 3 A_2)."""
    model = nn.ModuleDict({"up": Factor([[2.0, 1.0]])})
    factors = OrthogonalFactors(PenaltyConfig())
    factors.weight, factors.earlier = 0.5, {"up": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    factors.begin(model)
    assert factors.add_gradient(model, 1.0) == pytest.approx(0.5 * 13)
    torch.testing.assert_close(next(model.parameters()).grad, torch.tensor([[5.0, 3.0]]))


def test_an_infinite_olora_projects_off_the_earlier_rows_by_hand():
    model = nn.ModuleDict({"up": Factor([[2.0, 1.0, 3.0]])})
    factors = OrthogonalFactors(PenaltyConfig())
    factors.weight, factors.earlier = math.inf, {"up": torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])}
    factors.begin(model)
    torch.testing.assert_close(next(model.parameters()).detach(), torch.tensor([[0.0, 0.0, 3.0]]))
    factors.earlier = {"up": torch.eye(3)}
    with pytest.raises(FNSFTError, match="leaves none to train"):
        factors.begin(model)


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full", "plain"])
def test_an_infinite_ewc_changes_nothing_that_counts_and_a_tiny_one_is_plain_training(make, earlier, method):
    model = tiny_model("llama")
    start = state(model)
    held = make(method=method, model=model, penalties={"ewc": "inf", "ewc_datasets": [earlier]})
    held.train()
    counted = {name for name, fisher in held.penalties.elastic.fisher.items() if bool((fisher > 0).any())}
    assert counted
    now = dict(held.model.named_parameters())
    for name, fisher in held.penalties.elastic.fisher.items():
        center = held.penalties.elastic.center[name]
        assert torch.equal(now[name].detach()[fisher > 0], center[fisher > 0]), name
        if method in ("full", "plain"):
            assert torch.equal(center[fisher > 0], start[name][fisher > 0])
    plain, tiny = make(method=method), make(method=method, penalties={"ewc": 1e-30, "ewc_datasets": [earlier]})
    plain.train()
    tiny.train()
    found = state(tiny.model)
    assert all(torch.equal(value, found[name]) for name, value in state(plain.model).items())


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "plain"])
def test_lwf_adds_its_gradient_to_that_of_the_task(make, method):
    """At the third step: what the step adds is w times the gradient of the formula on its batch, by autograd."""
    trainer = make(method=method, max_steps=2, penalties={"lwf": 3.0})
    trainer.train()
    logged = [entry["lwf"] for entry in trainer.state.log_history if "lwf" in entry]
    assert len(logged) == 2
    model, answers = trainer.model, trainer.penalties.answers
    batch = next(iter(trainer.get_train_dataloader()))
    learnt = batch["labels"][:, 1:] != -100
    read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        before = tiny_model("llama")(**read).logits[:, :-1][learnt]
    now = model(**read).logits[:, :-1][learnt]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(3.0 * distillation(before, now, 2.0), trained)
    kept = state(model)
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = answers.step(trainer, model, batch)
    assert float(loss) == pytest.approx(3.0 * float(distillation(before, now, 2.0)), rel=1e-5)
    for parameter, wanted in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, kept[name]) for name, value in state(model).items())  # put back, bit for bit


def test_lwf_weighs_all_positions_of_a_step_alike_in_whatever_batches_they_come(make):
    """As the task does: with its batches cut in four, the first step has the same penalty."""
    first = []
    for batch in (4, 1):
        dealt = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        trainer = make(max_steps=1, penalties={"lwf": 3.0}, **dealt)
        trainer.train()
        lengths = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
        assert len(set(lengths)) > 1
        first.append(next(entry["lwf"] for entry in trainer.state.log_history if "lwf" in entry))
    assert first[1] == pytest.approx(first[0], rel=2e-6)


def test_the_logged_loss_is_the_sum_and_the_fisher_information_goes_on(make, earlier, tmp_path):
    first = make("first", max_steps=2, lora=True, penalties={"ewc_save": True, "ewc_rows": 4})
    first.train()
    first.save_model()
    more = {"ewc": 50.0, "ewc_from": str(tmp_path / "first"), "ewc_save": True, "ewc_rows": 4}
    second = make("second", max_steps=3, model=first.model, penalties=more, gradient_accumulation_steps=2)
    second.train()
    second.save_model()
    logged = [entry["ewc"] for entry in second.state.log_history if "ewc" in entry]
    assert logged[0] == 0  # before the first step
    assert logged[-1] > 0
    one, two = (run.penalties.elastic.measured[0] for run in (first, second))
    assert all(bool((two[name] >= one[name]).all()) for name in one)
    written = json.loads((tmp_path / "second" / "results.json").read_text())["penalties"]
    assert written["ewc"]["weight"] == 50.0
    with pytest.raises(FNSFTError, match="of other weights than those that train here"):
        make("third", penalties=more).train()
    with pytest.raises(FNSFTError, match="name the output directory of a run with ewc_save"):
        make("third", penalties=more | {"ewc_from": str(tmp_path)})


def test_a_second_training_keeps_what_the_first_one_kept(make, earlier):
    trainer = make(max_steps=1, penalties={"ewc": 5.0, "ewc_datasets": [earlier], "ewc_rows": 2, "lwf": 1.0})
    start = state(trainer.model)
    for _ in range(2):
        trainer.train()
        assert all(torch.equal(value, start[name]) for name, value in trainer.penalties.answers.before.items())
        assert all(torch.equal(value, start[name]) for name, value in trainer.penalties.elastic.center.items())
    assert any(not torch.equal(value, start[name]) for name, value in state(trainer.model).items())


@pytest.mark.slow
def test_a_run_that_is_resumed_keeps_what_it_kept_before(make, earlier):
    """Not the weights of the checkpoint."""
    given = {"penalties": {"ewc": 1e4, "ewc_datasets": [earlier], "ewc_rows": 2, "lwf": 3.0}, "max_steps": 4}
    whole = make(**given, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(**given)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    found = state(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in state(whole.model).items())


def test_penalties_leave_no_gradient_at_frozen_neurons(make, earlier):
    trainer = make(method="full", max_steps=1, penalties={"ewc": 5.0, "ewc_datasets": [earlier], "ewc_rows": 2})
    trainer.train()
    elastic, slices = trainer.penalties.elastic, trainer._run.way.frozen.slices
    elastic.center = {name: center + 1 for name, center in elastic.center.items()}  # as of several tasks
    a_while = FrozenSlices()  # as a phase of a MaskScheduleCallback has it
    some = NeuronMask({layer: torch.arange(len(m)) % 2 == 0 for layer, m in trainer.trainable_neurons.layers.items()})
    freeze_neurons(a_while, trainer.model, some & trainer.trainable_neurons)
    trainer.model.zero_grad()
    trainer.penalties.step(trainer, trainer.model, {})
    assert slices
    assert a_while.slices
    slices = [*slices, *a_while.slices]
    for each in slices:
        assert not each.parameter.grad[each.mask.expand_as(each.parameter)].any()
    assert any(bool(each.parameter.grad.any()) for each in slices)


def test_lwf_refuses_what_it_would_leave_out(make):
    trainer = make(max_steps=1, penalties={"lwf": 1.0})
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(FNSFTError, match="a batch holds pixel_values too"):
        trainer.penalties.answers.step(trainer, trainer.model, {**batch, "pixel_values": batch["input_ids"]})


@pytest.fixture
def adapter(tmp_path, model_dir):
    """A LoRA of an earlier task, saved."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    earlier = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    earlier.save_pretrained(tmp_path / "earlier")
    return str(tmp_path / "earlier")


def test_an_infinite_olora_trains_in_directions_in_which_no_earlier_adapter_reads(make, adapter):
    trainer = make(lora=True, penalties={"olora": "inf", "olora_adapters": [adapter]})
    before = {name: factor.detach().clone() for name, factor in lora_factors(trainer.model).items()}
    trainer.train()
    assert trainer.penalties.factors.overlap(trainer.model) < 1e-5
    after = lora_factors(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(FNSFTError, match="none of the modules that train"):
        make("other", method="neuron_delta", penalties={"olora": 1, "olora_adapters": [adapter]}).train()


def test_a_finite_olora_has_the_gradient_of_its_formula_and_turns_away(make, adapter):
    left = {}
    for weight in (1e-9, 10.0):
        trainer = make(lora=True, max_steps=8, penalties={"olora": weight, "olora_adapters": [adapter]})
        trainer.train()
        factors, trained = trainer.penalties.factors, lora_factors(trainer.model)
        products = [(factor @ factors.earlier[name].T).square().sum() for name, factor in trained.items()]
        left[weight] = float(sum(products).detach())
    expected = torch.autograd.grad(10.0 * sum(products), list(trained.values()))
    trainer.model.zero_grad()
    assert factors.add_gradient(trainer.model, 1.0) == pytest.approx(10.0 * left[10.0], rel=1e-5)
    for factor, wanted in zip(trained.values(), expected, strict=True):
        torch.testing.assert_close(factor.grad, wanted)
    assert left[10.0] < 0.7 * left[1e-9]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ewc": 1.0}, "without rows of earlier tasks"),
        ({"ewc_datasets": ["a=b"]}, "without ewc"),
        ({"ewc_rows": 5}, "without ewc"),
        ({"ewc": "big", "ewc_from": "x"}, "a number above 0, or inf"),
        ({"lwf_temperature": 3.0}, "without lwf"),
        ({"olora": 1.0}, "without olora_adapters"),
        ({"olora_adapters": ["x"]}, "without olora"),
    ],
)
def test_an_option_without_effect_is_refused(given, message):
    with pytest.raises(FNSFTError, match=message):
        PenaltyConfig(**given)
