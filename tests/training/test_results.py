"""The end of a run: one table in the log, results.json beside the weights, and the same in the model card."""

import json
import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import sft_config, tiny_model
from hub import ALICE
from peft import LoraConfig
from transformers import TrainerCallback

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, RetentionCallback, find_neuron_sites, lesion
from fnsft_trl.training import RetentionBudgetExceeded
from fnsft_trl.training.results import RESULTS_FILE, RESULTS_SECTION


TEXTS = ["Say bako: okab. Say riten: netir. Say sumo: omus."] * 4


@pytest.fixture
def make(templates, rows, tokenizer, tmp_path):
    def make(directory="run", *, network=None, retention=True, networks=True, lora=False, evaluated=rows[:6], **args):
        if isinstance(evaluated, list):
            evaluated = Dataset.from_list(evaluated)
        trainer = FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path / directory, **args),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=evaluated
            if evaluated is None or isinstance(evaluated, dict)
            else Dataset.from_list(evaluated),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
            network_config=FunctionalNetworkConfig(**(network or {})) if networks else None,
            network_template=templates["llama"] if networks else None,
        )
        if retention:
            trainer.add_callback(RetentionCallback(trainer, TEXTS, name="wiki", max_tokens=60))
        return trainer

    return make


def finish(trainer):
    """Train and save as `fnsft train` does; what stands in `results.json` and in the card."""
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    directory = Path(trainer.args.output_dir)
    return json.loads((directory / RESULTS_FILE).read_text()), (directory / "README.md").read_text()


def table_in(caplog):
    """The rows of the table in the log."""
    (message,) = [record.getMessage() for record in caplog.records if "the run in short" in record.message]
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in message.splitlines()[1:])


@pytest.mark.parametrize("method", ["neuron_delta", "full"])
def test_the_end_of_a_run_says_it_all(make, caplog, method):
    trainer = make(network={"mask_mode": "preserve", "train_method": method, "ica_component_ids": [0]})
    with caplog.at_level(logging.WARNING, "fnsft_trl"):
        found, card = finish(trainer)
    history = trainer.state.log_history
    last = {name: value for entry in history for name, value in entry.items()}
    assert (found["steps"], found["weights_of_step"]) == (4, 4)
    for mask in ("masked", "unmasked"):
        values = found["evaluation"][mask]
        assert {"loss", "mean_token_accuracy"} <= values.keys()
        assert values == {name: last[f"eval_{mask}_{name}"] for name in values}
    assert found["retention"]["budget"] is None
    wiki = found["retention"]["series"]["wiki"]
    assert wiki["rise"] == last["retention/wiki/rise"]
    assert wiki["kl"] == last["retention/wiki/kl"]
    assert wiki["tokens"] == 60
    networks = found["networks"]
    assert networks["selected"]["count"] == trainer.neuron_mask.count
    assert networks["trained"] == {
        "count": trainer.trainable_neurons.count,
        "sha256": trainer.trainable_neurons.sha256,
        "fraction": trainer.trainable_neurons.fraction,
    }
    frozen = (~trainer.trainable_neurons).count
    assert (found["guard"]["neurons"], found["guard"]["moved"], found["guard"]["step"]) == (frozen, 0, 4)
    assert found["guard"]["other_parameters"] > 0

    rows = table_in(caplog)
    assert rows["guard"].startswith(f"frozen neurons checked {frozen}, moved 0; other frozen parameters ")
    assert rows["retention wiki"].startswith(f"rise {wiki['rise']:+.4f}, KL {wiki['kl']:.4f}")
    assert rows["evaluation under the mask"].startswith(f"loss {found['evaluation']['masked']['loss']:.4f}")
    assert rows["evaluation without the mask"].startswith(f"loss {found['evaluation']['unmasked']['loss']:.4f}")
    section = card.partition(RESULTS_SECTION)[2]
    assert [name for name in rows if f"| {name} | " in section] == list(rows)
    assert f"frozen neurons checked {frozen}, moved 0" in section


def test_a_run_without_networks_tells_what_it_lost(make, caplog):
    with caplog.at_level(logging.WARNING, "fnsft_trl"):
        found, card = finish(make(networks=False, lora=True, eval_strategy="steps", eval_steps=2))
    assert found["networks"] is None
    assert found["guard"] is None
    assert found["evaluation"]["step"] == 4
    assert "loss" in found["evaluation"]["during"]
    assert set(table_in(caplog)) == {"steps", "evaluation", "retention wiki"}
    assert "| retention wiki | rise " in card
    assert "## Functional networks" not in card


def test_a_run_without_networks_and_retention_is_left_as_it_is(make, caplog, tmp_path):
    trainer = make(networks=False, retention=False)
    with caplog.at_level(logging.WARNING, "fnsft_trl"):
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    assert "the run in short" not in caplog.text
    assert not (tmp_path / "run" / RESULTS_FILE).exists()
    assert RESULTS_SECTION not in (tmp_path / "run" / "README.md").read_text()


def test_a_run_without_evaluation_and_guard_says_so(make, caplog):
    with caplog.at_level(logging.WARNING, "fnsft_trl"):
        found, _ = finish(make(network={"frozen_guard": False}, retention=False, evaluated=None))
    assert found["evaluation"] == {"masked": {}, "unmasked": {}, "during": {}, "step": None}
    assert (found["retention"], found["guard"]) == (None, None)
    rows = table_in(caplog)
    assert rows["guard"] == "off: nothing was checked"
    assert set(rows) == {"steps", "selected", "trained", "guard"}


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings["network"] = {"mask_mode": "lesion"}
    whole, _ = finish(make("whole", **settings))
    again = make("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    resumed, _ = finish(again)
    assert resumed == whole
    assert not list((tmp_path / "whole").glob(f"checkpoint-*/{RESULTS_FILE}"))


def test_the_evaluation_is_that_of_the_weights(make, rows):
    """Of the best checkpoint, where it is loaded: here the one of the highest loss, which comes early."""
    settings = {"greater_is_better": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(evaluated={"a b": Dataset.from_list(rows[:4])}, metric_for_best_model="a b_loss", **settings)
    found, _ = finish(trainer)
    best = trainer.state.best_global_step
    assert 0 < best < 6
    assert found["weights_of_step"] == found["evaluation"]["step"] == best
    assert found["evaluation"]["during"]["a b_loss"] == trainer.state.best_metric


@pytest.mark.slow
def test_a_second_training_has_results_of_its_own(make, tmp_path):
    trainer = make(network={"mask_mode": "lesion"})
    first, _ = finish(trainer)
    trainer.args.max_steps = 2
    second, card = finish(trainer)
    assert (first["steps"], second["steps"]) == (4, 2)
    assert first["evaluation"] != second["evaluation"]
    assert card.count(RESULTS_SECTION) == card.count("## Functional networks") == 1
    assert f"{second['evaluation']['masked']['loss']:.4f}" in card


@pytest.mark.slow
def test_a_saved_card_is_renewed(make):
    """PEFT keeps the README that lies where an adapter is saved, and with it what an earlier run wrote there."""
    trainer = make(network={"ica_component_ids": [0]}, retention=False)
    trainer.train()
    trainer.save_model()
    other = make(network={"ica_component_ids": [1, 2]}, retention=False)
    other.train()
    other.save_model()
    card = (Path(other.args.output_dir) / "README.md").read_text()
    assert "networks 1-2 of 3" in card
    assert "networks 0 of 3" not in card
    assert card.count("## Functional networks") == 1


def test_results_of_an_earlier_run_do_not_stay_beside_other_weights(make):
    trainer = make(network={"ica_component_ids": [0]})
    finish(trainer)
    directory = Path(trainer.args.output_dir)
    make(networks=False, retention=False, lora=True).save_model()
    assert not (directory / RESULTS_FILE).exists()
    assert RESULTS_SECTION not in (directory / "README.md").read_text()
    (directory / RESULTS_FILE).write_text('{"format": "of somebody else"}')
    make(networks=False, retention=False, lora=True).save_model()
    assert (directory / RESULTS_FILE).exists()


def test_what_was_done_about_the_budget_is_told(make, caplog):
    """A run that no measurement of keeps to its budget ends in an error, and says it all too."""
    trainer = make(retention=False, learning_rate=0.3, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(RetentionCallback(trainer, ["koko ko ba." * 9], name="wiki", max_tokens=60, budget=0.0))
    with caplog.at_level(logging.WARNING, "fnsft_trl"), pytest.raises(RetentionBudgetExceeded):
        trainer.train()
    trainer.save_model()
    found = json.loads((Path(trainer.args.output_dir) / RESULTS_FILE).read_text())
    assert found["weights_of_step"] == 0
    assert found["retention"]["budget"] == 0.0
    assert found["retention"]["series"]["wiki"]["rise"] == pytest.approx(0, abs=1e-6)
    rows = table_in(caplog)
    assert rows["done"] == found["retention"]["done"]
    assert rows["done"].startswith("rolled back to step 0")
    assert rows["steps"].endswith("the weights are of 0")


class Endless(TrainerCallback):
    """Logs a value that JSON has no number for."""

    def on_evaluate(self, args, state, control, **kwargs):
        state.log_history.append({"eval_ratio": float("inf"), "eval_kind": "text", "step": state.global_step})


def test_results_are_json_whatever_is_measured(make):
    trainer = make(eval_strategy="steps", eval_steps=4)
    trainer.add_callback(Endless())
    found, _ = finish(trainer)
    assert found["evaluation"]["during"]["ratio"] == "inf"
    assert "kind" not in found["evaluation"]["during"]


def test_results_are_pushed_and_tell_nothing_of_the_machine(make, hub, tmp_path):
    trainer = make(push_to_hub=True, hub_model_id="alice/model", hub_token=ALICE)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("alice/model")
    text = files[RESULTS_FILE].decode()
    assert json.loads(text)["steps"] == 4
    assert str(tmp_path) not in text
    assert ALICE not in text
    assert RESULTS_SECTION in files["README.md"].decode()


def test_the_guard_counts_the_frozen_neurons_that_it_reads(make):
    trainer = make(retention=False, evaluated=None, lora=True, network={"ica_component_ids": [0]})
    trainer.train()
    guard = trainer._run.guard
    total = sum(site.width for site in find_neuron_sites(trainer.model))
    assert guard.neurons == total - trainer.trainable_neurons.count
    with lesion(trainer.model, trainer.neuron_mask):
        guard.check(step=9)
    assert guard.checked == 9
