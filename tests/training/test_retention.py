import json

import pytest
import torch
from datasets import Dataset
from helpers import random_mask, sft_config, state, tiny_model
from peft import LoraConfig, PeftModel
from transformers import EarlyStoppingCallback, Trainer
from trl import SFTTrainer

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, RetentionCallback, RetentionConfig, lesion
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.training import RetentionBudgetExceeded
from fnsft_trl.training.engines import Engine
from fnsft_trl.training.retention import retention_of
from fnsft_trl.training.retention_texts import task_prompts


EACH = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {**EACH, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def texts(tmp_path):
    """Two files of general text."""
    (tmp_path / "wiki.txt").write_text("Say bako: okab.\nThe red fox went to the sea\n" * 9)
    (tmp_path / "law.jsonl").write_text("\n".join(json.dumps({"text": f"{n} 9876543210"}) for n in range(20)))
    return [f"wiki={tmp_path / 'wiki.txt'}", str(tmp_path / "law.jsonl")]


@pytest.fixture
def make(rows, tokenizer, templates, tmp_path):
    def make(name="out", *, method="neuron_delta", retention=None, data=rows, model=None, **args):
        networks = {
            "network_config": FunctionalNetworkConfig(train_method=method or "auto"),
            "network_template": templates["llama"],
            "peft_config": LoraConfig(r=2) if method == "lora" else None,
        }
        return FNSFTTrainer(
            model=model or tiny_model("llama"),
            args=sft_config(tmp_path / name, **args),
            train_dataset=Dataset.from_list(data),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tokenizer,
            retention=retention and RetentionConfig(**{"retention_tokens": 60, **retention}),
            **(networks if method else {}),
        )

    return make


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, message, *a, **k: lines.append(str(message)))
    return lines


def measured(trainer, name="retention/wiki/rise") -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_named_series_are_measured_at_the_start_at_each_evaluation_and_at_the_end(make, texts, log):
    trainer = make(retention={"retention_datasets": texts}, eval_strategy="steps", eval_steps=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "retention/wiki/kl" in entry]
    assert [entry["step"] for entry in entries] == [0, 3, 4]
    values = {f"retention/{name}/{kind}" for name in ("wiki", "law") for kind in ("rise", "cross_entropy", "kl")}
    for entry in entries:
        assert {key for key in entry if key.startswith("retention/")} >= values | {"retention/task/kl"}
        for name in ("wiki", "law"):
            base = entries[0][f"retention/{name}/base"]
            assert entry[f"retention/{name}/cross_entropy"] - base == entry[f"retention/{name}/rise"]
    assert entries[0]["retention/wiki/tokens"] == 60
    assert entries[0]["retention/wiki/base"] != entries[0]["retention/law/base"]
    assert entries[0]["retention/law/rise"] == entries[0]["retention/law/kl"] == 0 < entries[2]["retention/law/kl"]
    assert "retention/task/rise" not in entries[2]
    (last,) = [line for line in log if line.startswith("learnt:")]
    assert "eval_loss" in last
    assert last.endswith("done: no budget")
    assert [line for line in log if "retention: law: 60 tokens" in line and "KL exact" in line]


def test_what_is_logged_is_what_the_reloaded_adapter_has(make, texts, tmp_path, tokenizer):
    trainer = make(retention={"retention_datasets": texts}, **EACH)
    trainer.train()
    trainer.save_model()
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out")
    lines = (tmp_path / "wiki.txt").read_text().splitlines()
    text = RetentionText.from_texts(lines, tokenizer, max_tokens=60)
    rise = text.cross_entropy(model) - text.cross_entropy(tiny_model("llama"))
    assert measured(trainer)[-1][1] == pytest.approx(rise, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "neuron_delta", "lora", "full"])
def test_measuring_changes_nothing_of_the_training(make, texts, method):
    weights = []
    for retention in (None, {"retention_datasets": texts}):
        trainer = make(method=method, retention=retention, **EACH)
        trainer.train()
        weights.append(state(trainer.model))
        kinds = {each.kl_kind for each in run.series} if (run := retention_of(trainer)) else set()
    assert kinds == {"exact" if method in ("neuron_delta", "lora") else "top-k"}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_evaluate_returns_the_values_and_the_best_model_is_chosen_by_them(make, texts, log):
    settings = {**SAVED, "load_best_model_at_end": True, "metric_for_best_model": "retention/wiki/rise"}
    trainer = make(retention={"retention_datasets": texts}, **settings)
    trainer.train()
    rises = dict(measured(trainer)[1:-1])
    best = min(rises, key=rises.get)
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == rises[best]
    # Measured again when the best one was loaded.
    assert measured(trainer)[-1] == (4, pytest.approx(rises[best], abs=1e-6))
    assert trainer.evaluate()["eval_retention/wiki/rise"] == measured(trainer)[-1][1]
    assert any("the best model is that of the lowest retention/wiki/rise" in line for line in log)


def test_early_stopping_finds_the_values_in_whatever_order_callbacks_are_added(make, texts, log):
    settings = {**SAVED, "load_best_model_at_end": True, "metric_for_best_model": "retention/wiki/rise"}
    trainer = make(max_steps=8, **settings)
    trainer.add_callback(EarlyStoppingCallback(2, early_stopping_threshold=9.0))
    lines = ["The red fox went to the sea"] * 9
    trainer.add_callback(RetentionCallback(trainer, lines, name="wiki", max_tokens=60))
    trainer.train()
    assert not [line for line in log if "early stopping is disabled" in line]
    assert trainer.state.global_step < 8


@pytest.mark.parametrize(
    ("metric", "message"),
    [("retention/wki/rise", "must be one of: retention/wiki/rise"), ("retention/task/rise", "task/kl")],
)
def test_a_metric_of_no_series_is_an_error(make, texts, metric, message):
    trainer = make(retention={"retention_datasets": texts}, metric_for_best_model=metric, **SAVED)
    with pytest.raises(FNSFTError, match=message):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "full"])
def test_a_resumed_run_has_the_values_of_the_uninterrupted_one(make, texts, tmp_path, method):
    whole = make("whole", method=method, retention={"retention_datasets": texts}, **{**SAVED, "save_steps": 2})
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "retention.safetensors").exists() == (method == "full")
    assert not (tmp_path / "whole" / "retention.safetensors").exists()
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["retention"]
    assert {name: entry["sha256"] for name, entry in stored.items()} == {
        each.name: each.text.sha256 for each in retention_of(whole).series
    }
    resumed = make("other", method=method, retention={"retention_datasets": texts}, **{**SAVED, "save_steps": 2})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("retention/wiki/rise", "retention/law/kl", "retention/task/kl", "retention/law/cross_entropy"):
        assert measured(resumed, name)[-1] == measured(whole, name)[-1]


@pytest.mark.slow
def test_a_checkpoint_of_another_text_or_of_none_is_an_error(make, texts, tmp_path):
    make("one", retention={"retention_datasets": texts}, **SAVED).train()
    make("none", **SAVED).train()
    (tmp_path / "wiki.txt").write_text("Another text.\n" * 20)
    trainer = make("one", retention={"retention_datasets": texts}, **SAVED)
    with pytest.raises(FNSFTError, match="'wiki' is not that of the run which is resumed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    trainer = make("none", retention={"retention_datasets": texts}, **SAVED)
    with pytest.raises(FNSFTError, match="written without a RetentionCallback for the series 'wiki'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none" / "checkpoint-2"))


@pytest.mark.slow
def test_a_second_training_is_measured_against_the_first_base(make):
    trainer = make(max_steps=2)
    callback = RetentionCallback(trainer, ["The red fox went to the sea"] * 9, max_tokens=60)
    trainer.add_callback(callback)
    trainer.train()
    base, first = callback.base, measured(trainer, "retention/rise")
    trainer.train()
    second = measured(trainer, "retention/rise")
    assert callback.base == base
    assert [step for step, _ in second] == [0, 2]
    assert second[0][1] == first[-1][1] != second[1][1]


def test_callbacks_without_a_name_have_series_of_their_own(make):
    trainer = make(max_steps=1)
    one = RetentionCallback(trainer, ["The red fox went to the sea"] * 9, max_tokens=60)
    two = RetentionCallback(trainer, ["9876543210 987"] * 9, max_tokens=60)
    trainer.add_callback(one)
    trainer.add_callback(two)
    trainer.train()
    assert one.base != two.base
    (_, rise), (_, other) = measured(trainer, "retention/rise")[-1], measured(trainer, "retention/2/rise")[-1]
    base = tiny_model("llama")
    assert rise == pytest.approx(one.text.cross_entropy(trainer.model) - one.text.cross_entropy(base), abs=1e-5)
    assert other == pytest.approx(two.text.cross_entropy(trainer.model) - two.text.cross_entropy(base), abs=1e-5)


@pytest.mark.slow
def test_two_series_of_one_name_or_two_budgets_are_an_error(make):
    for settings, message in (
        ({"name": "a"}, "two retention series are named 'a'"),
        ({"name": "b", "budget": 0.2}, "different budgets: 0.1 .rollback., 0.2 .rollback."),
    ):
        trainer = make()
        trainer.add_callback(RetentionCallback(trainer, ["Say bako."], name="a", budget=0.1))
        trainer.add_callback(RetentionCallback(trainer, ["Say bako."], **settings))
        with pytest.raises(FNSFTError, match=message):
            trainer.train()
    for budget, action in ((-1, "stop"), (0.1, "pause"), (float("nan"), "stop")):
        with pytest.raises(FNSFTError):
            RetentionCallback(trainer, ["Say bako."], budget=budget, on_budget=action)


@pytest.mark.slow
def test_it_is_measured_without_the_mask(templates, rows, tokenizer, tmp_path):
    """The rise is that of the weights: a lesion alone, with hardly any training, does not show in it."""
    for mask_eval in (True, False):
        trainer = FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path, learning_rate=1e-9, eval_strategy="steps", eval_steps=2),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(mask_mode="lesion", mask_eval=mask_eval),
            network_template=templates["llama"],
        )
        trainer.add_callback(RetentionCallback(trainer, ["Say bako: okab."], max_tokens=80))
        trainer.train()
        assert max(abs(rise) for _, rise in measured(trainer, "retention/rise")) < 1e-4
        assert max(kl for _, kl in measured(trainer, "retention/kl")) < 1e-4
        with lesion(trainer.model, random_mask(trainer.model, "mlp_intermediate")):
            assert trainer.evaluate()["eval_retention/rise"] < 1e-4


@pytest.mark.slow
def test_it_works_with_a_plain_trainer(rows, tokenizer, tmp_path):
    """Budget, checkpoints and resume included, on a Trainer that knows nothing of this package."""

    def plain(name, **settings):
        data = [
            {"input_ids": ids, "labels": ids}
            for ids in (tokenizer(row["prompt"] * 2)["input_ids"][:4] for row in rows)
        ]
        model = tiny_model("llama")
        args = sft_config(tmp_path / name, **SAVED)
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], processing_class=tokenizer)
        lines = ["The red fox went to the sea"] * 9
        trainer.add_callback(RetentionCallback(trainer, lines, name="wiki", max_tokens=60, **settings))
        return trainer

    whole = plain("whole")
    whole.train()
    resumed = plain("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert measured(resumed, "retention/wiki/kl")[-1] == measured(whole, "retention/wiki/kl")[-1]
    ended = plain("ended", budget=1e-9)
    with pytest.raises(RetentionBudgetExceeded):
        ended.train()
    assert all(torch.equal(v, tiny_model("llama").state_dict()[n]) for n, v in ended.model.state_dict().items())


# The budget

# A run whose rise grows from step to step while its loss falls.
GROWS = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 6}


def highest(trainer) -> list[tuple[int, float]]:
    """The step of each measurement, and the higher rise of the two series."""
    pairs = zip(measured(trainer, "retention/wiki/rise"), measured(trainer, "retention/law/rise"), strict=True)
    return [(step, max(rise, other)) for (step, rise), (_, other) in pairs]


@pytest.fixture
def free(make, texts):
    """Rises and losses of a run without a budget, by step, and a budget that steps 1 and 2 are within."""

    def free(**args):
        trainer = make("free", retention={"retention_datasets": texts}, **{**GROWS, **SAVED, **args})
        trainer.train()
        rises = dict(highest(trainer))
        assert max(rises[1], rises[2]) < min(rises[step] for step in (3, 4, 5, 6))
        losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
        return rises, losses, (max(rises[1], rises[2]) + rises[3]) / 2

    return free


def last_line(log) -> str:
    (line,) = [line for line in log if line.startswith("learnt:")]
    return line


def test_what_was_not_measured_is_not_said_to_be_nothing(make, texts, log):
    make(retention={"retention_datasets": texts}, max_steps=1, logging_strategy="no").train()
    assert last_line(log).startswith("learnt: not measured, no loss was logged; lost")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_rollback_brings_the_last_state_within_the_budget_back(make, texts, log, free, method):
    args = {**GROWS, **EACH, "method": method, "learning_rate": 0.03 if method == "lora" else 0.1}
    rises, losses, budget = free(**args)
    log.clear()
    trainer = make("out", retention={"retention_datasets": texts, "retention_budget": budget}, **args)
    trainer.train()
    assert highest(trainer) == [*((step, rises[step]) for step in range(4)), (3, pytest.approx(rises[2], abs=1e-7))]
    trainer.save_model()
    short = make("short", **{**args, "max_steps": 2})
    short.train()
    expected = state(short.model)
    assert all(torch.equal(value, expected[name]) for name, value in state(trainer.model).items())
    line = last_line(log)
    assert f"eval_loss {losses[1]:.4f} at step 1 -> {losses[2]:.4f} at step 2; lost" in line
    assert f"done: rolled back to step 2, the last within the budget of {budget:g}; " in line
    assert line.endswith("at step 3")


@pytest.mark.slow
def test_a_stop_keeps_the_state_that_passed_and_a_warning_goes_on(make, texts, log, free):
    rises, _, budget = free()
    for action, end in (("stop", 3), ("warn", 6)):
        log.clear()
        retention = {"retention_datasets": texts, "retention_budget": budget, "retention_on_budget": action}
        trainer = make(action, retention=retention, **{**GROWS, **EACH})
        trainer.train()
        assert highest(trainer) == [(step, rises[step]) for step in range(end + 1)]
        assert len([line for line in log if "is passed" in line]) == (1 if action == "stop" else 4)
        assert f"done: {'stopped' if action == 'stop' else 'nothing'}, over {budget:g}; " in last_line(log)


def test_where_no_state_is_within_the_budget_the_base_comes_back(make, texts):
    trainer = make(retention={"retention_datasets": texts, "retention_budget": 0}, **{**GROWS, **SAVED})
    base = state(trainer.model)
    with pytest.raises(RetentionBudgetExceeded, match="no measurement of this training is within"):
        trainer.train()
    assert all(torch.equal(value, base[name]) for name, value in state(trainer.model).items())
    assert highest(trainer)[-1] == (1, 0)
    assert not trainer.is_in_train


@pytest.mark.slow
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_the_best_checkpoint_within_the_budget_is_loaded(make, texts, log, free, action):
    """By the loss of the task alone, a later one would be better."""
    best = {**GROWS, **SAVED, "load_best_model_at_end": True}
    rises, losses, budget = free()
    assert min(losses, key=losses.get) > 2
    log.clear()
    retention = {"retention_datasets": texts, "retention_budget": budget, "retention_on_budget": action}
    trainer = make("out", retention=retention, **best)
    trainer.train()
    assert trainer.state.best_global_step == min((1, 2), key=losses.get)
    assert highest(trainer)[-1][1] == pytest.approx(rises[trainer.state.best_global_step], abs=1e-7)
    assert "the best checkpoint within the budget" in last_line(log)


@pytest.mark.parametrize("method", [LoraConfig(r=2, target_modules=["up_proj"]), None])
def test_a_plain_trainer_that_loads_a_best_model_over_the_budget_is_rolled_back(
    rows, tokenizer, tmp_path, log, method
):
    """Its best model is chosen by the loss alone, and is the last one here."""
    data = Dataset.from_list(rows)
    settings = {**GROWS, **EACH, "save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": False}
    settings |= {"load_best_model_at_end": True, "learning_rate": 0.03}
    trainer = SFTTrainer(
        tiny_model("llama"),
        sft_config(tmp_path / "out", **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=method,
    )
    base = state(trainer.model)
    lines = ["9876543210 is it"] * 20
    trainer.add_callback(RetentionCallback(trainer, lines, name="law", max_tokens=60, budget=0))
    with pytest.raises(RetentionBudgetExceeded):
        trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert all(torch.equal(value, base[name]) for name, value in state(trainer.model).items())


@pytest.mark.slow
def test_no_checkpoint_over_the_budget_is_written_or_resumed(make, texts, tmp_path, free):
    _, _, budget = free()
    trainer = make("out", retention={"retention_datasets": texts, "retention_budget": budget}, **{**GROWS, **SAVED})
    trainer.train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    trainer = make("free", retention={"retention_datasets": texts, "retention_budget": budget}, **{**GROWS, **SAVED})
    with pytest.raises(FNSFTError, match=r"before this training: the budget of .* is passed; resume from an earlier"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "free" / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "free" / "checkpoint-1"))
    assert [step for step, _ in highest(trainer)][-2:] == [3, 3]


def test_a_rollback_of_sharded_weights_is_refused(make, texts, monkeypatch):
    trainer = make(retention={"retention_datasets": texts, "retention_budget": 1.0})
    monkeypatch.setattr(Engine, "of_trainer", lambda trainer: Engine("FSDP2"))
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, RetentionCallback))
    with pytest.raises(FNSFTError, match="retention_on_budget=rollback does not run under FSDP2"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


# The texts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wiki=nowhere.txt", "nowhere.txt does not exist"),
        ("wiki=empty.txt", "empty"),
        ("wiki=blank.txt", "holds no text|is empty"),
        ("wiki=numbers.jsonl", "holds no text|no format|columns"),
        ("wiki=a/model-that-is-not-there", "neither here nor on the Hub|the Hub cannot be reached"),
    ],
)
def test_a_source_that_holds_no_text_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, hub, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n \n")
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(FNSFTError, match=message) as error:
        FNSFTTrainer("no/model", sft_config(tmp_path), retention=RetentionConfig(retention_datasets=[given]))
    assert "\n" not in str(error.value)


def test_texts_that_are_trained_on_are_named_for_each_series(make, texts, rows, tmp_path, log):
    (tmp_path / "wiki.txt").write_text(
        f"{rows[3]['prompt'].upper()}{rows[3]['completion']}\nThe red fox went to sea\n" * 2
    )
    make(retention={"retention_datasets": texts})
    (line,) = [line for line in log if "too, so its rise" in line]
    assert line.startswith("2 of the 4 rows of the retention text 'wiki' stand in the training data")
    assert rows[3]["completion"].strip() in line


def test_a_text_with_too_few_tokens_is_said(make, texts, log):
    make(retention={"retention_datasets": texts, "retention_tokens": 100_000})
    assert [line for line in log if line.startswith("the retention text 'law' holds ") and "not the 100000" in line]


def prompts_of(rows, tokenizer, tokens=100):
    text = task_prompts(Dataset.from_list(rows), tokenizer, tokens=tokens, seed=0)
    return text and sorted(text.sequences)


def test_the_prompts_of_the_task_end_with_the_first_token_that_is_learnt(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 9, 9], "labels": [5, 9, 9]},
        {"input_ids": [4, 4], "labels": [-100, -100]},
    ]
    assert prompts_of(rows, tokenizer) == [[5, 6, 7], [5, 9, 9]]
    assert sum(len(ids) - 1 for ids in prompts_of(rows, tokenizer, 3)) == 3
    assert prompts_of(rows[2:], tokenizer) is None
    assert prompts_of([{"text": "a"}], tokenizer) is None
    packed = [{"input_ids": [5, 6, 7, 1, 2, 3], "labels": [-100, 6, 7, -100, -100, 3], "seq_lengths": [3, 3]}]
    assert prompts_of(packed, tokenizer) == [[1, 2, 3], [5, 6]]


def test_the_prompts_of_preferences_and_of_rows_as_they_are(tokenizer):
    assert prompts_of([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}], tokenizer) == [[5, 6, 7]]
    assert prompts_of([{"prompt_ids": [5, 6], "completion_ids": [9], "label": True}], tokenizer) == [[5, 6, 9]]
    turn = [{"role": "user", "content": "ba"}]
    for prompt, text in (("Say ba:", "Say ba:"), (turn, "user: ba<eos>assistant: ")):
        (ids,) = prompts_of([{"prompt": prompt}], tokenizer)
        assert ids[:-1] == tokenizer(text)["input_ids"]


def test_the_prompts_are_those_that_sft_trainer_learns_nothing_of(make, texts, rows, tokenizer):
    trainer = make(retention={"retention_datasets": texts, "retention_tokens": 10_000})
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, RetentionCallback)]
    (task,) = [series.text for series in callback.series if series.name == "task"]
    prompts = sorted(tokenizer(row["prompt"])["input_ids"] for row in rows)
    assert sorted(ids[:-1] for ids in task.sequences) == prompts
