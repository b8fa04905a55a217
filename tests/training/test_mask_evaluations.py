"""Evaluations of a run with a forward mask: with it or without it, as asked, and both at the end."""

import logging
import re

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model
from transformers import TrainerCallback, set_seed

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, find_neuron_sites, lesion
from fnsft_trl.export import changed_neurons


PART, OTHER = slice(0, 6), slice(6, 14)


@pytest.fixture
def make(templates, rows, tokenizer, tmp_path):
    def make(evaluated=rows[PART], *, model=None, args=None, method="neuron_delta", **config):
        several = isinstance(evaluated, dict)
        sets = {name: Dataset.from_list(part) for name, part in evaluated.items()} if several else None
        return FNSFTTrainer(
            model=model or tiny_model("llama"),
            args=sft_config(tmp_path, **{"max_steps": 2, **(args or {})}),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=sets or (None if evaluated is None else Dataset.from_list(evaluated)),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(train_method=method, **config),
            network_template=templates["llama"],
        )

    return make


class Silent(TrainerCallback):
    """Whether the masked neurons were silent, in every forward pass outside of training."""

    def __init__(self, trainer):
        self.seen = []
        for site in find_neuron_sites(trainer.model):
            silenced = trainer.neuron_mask.layers[site.layer]
            site.down.register_forward_pre_hook(self._hook(silenced))

    def _hook(self, silenced):
        def hook(module, args):
            if not module.training:
                self.seen.append(not args[0][..., silenced].any())

        return hook

    def take(self):
        seen, self.seen = set(self.seen), []
        (found,) = seen  # all alike
        return found


@pytest.mark.slow
@pytest.mark.parametrize("mask_eval", [True, False])
@pytest.mark.parametrize("call", ["evaluate", "evaluate several", "predict"])
def test_every_kind_of_evaluation_runs_as_mask_eval_says(make, rows, mask_eval, call):
    sets = {"a": rows[PART], "b": rows[OTHER]}
    trainer = make(sets if call == "evaluate several" else rows[PART], mask_mode="lesion", mask_eval=mask_eval)
    silent = Silent(trainer)
    trainer.predict(trainer.eval_dataset) if call == "predict" else trainer.evaluate()
    assert silent.take() == mask_eval
    trainer.model.eval()(torch.tensor([[5, 6, 7]]))
    assert silent.take()  # the mask is on again
    trainer.train()
    silent.seen = []
    trainer.predict(trainer.eval_dataset) if call == "predict" else trainer.evaluate()
    assert silent.take() == mask_eval


@pytest.mark.slow
def test_predict_and_evaluate_agree(make, rows):
    for mask_eval in (True, False):
        trainer = make(mask_mode="lesion", mask_eval=mask_eval)
        trainer.train()
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("mask_eval", [True, False])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mode", ["lesion", "preserve"])
def test_training_ends_with_both_under_names_of_their_own(make, rows, caplog, mask_eval, several, mode):
    sets = {"a": rows[PART], "b": rows[OTHER]}
    trainer = make(sets if several else rows[PART], mask_mode=mode, mask_eval=mask_eval)
    with caplog.at_level(logging.WARNING, "fnsft_trl"):
        trainer.train()
    ended = next(i for i, entry in enumerate(trainer.state.log_history) if "train_runtime" in entry)
    final = trainer.state.log_history[ended + 1 :]
    parts = ("_a", "_b") if several else ("",)
    assert len(final) == 2 * len(parts)
    logged = {name: value for entry in final for name, value in entry.items() if name not in ("epoch", "step")}
    assert all(name.startswith(("eval_masked_", "eval_unmasked_")) for name in logged)
    for part in parts:
        assert logged[f"eval_masked{part}_loss"] != logged[f"eval_unmasked{part}_loss"]
    assert logged["eval_masked_mean_token_accuracy"] >= 0
    assert logged["eval_unmasked_mean_token_accuracy"] >= 0

    (table,) = [record.getMessage() for record in caplog.records if "the run in short" in record.message]
    for name, words in (("masked", "under the mask"), ("unmasked", "without the mask")):
        (row,) = [line for line in table.splitlines() if f"evaluation {words}" in line]
        shown = dict(re.findall(r"(\S*loss) (\d+\.\d+)", row))
        beginning = f"eval_{name}_"
        losses = {key.removeprefix(beginning): value for key, value in logged.items() if key.startswith(beginning)}
        assert shown == {key: f"{value:.4f}" for key, value in losses.items() if key.endswith("loss")}
    # Evaluated again, they are what they were; an evaluation of the user's has its usual names.
    for masked in (True, False):
        trainer._evaluate_masked = masked
        again = trainer.evaluate()
        name = "masked" if masked else "unmasked"
        for part in parts:
            assert again[f"eval{part}_loss"] == logged[f"eval_{name}{part}_loss"]
        assert "eval_mean_token_accuracy" in again


@pytest.mark.slow
def test_nothing_is_evaluated_where_there_is_no_mask_or_no_data(make, caplog):
    for trainer in (make(None, mask_mode="lesion"), make()):
        trainer.train()
        assert not any("eval" in name for entry in trainer.state.log_history for name in entry)
    assert "evaluation" not in caplog.text


def test_an_evaluation_that_fails_at_the_end_leaves_evaluations_as_they_were(make, monkeypatch):
    trainer = make(mask_mode="lesion", mask_eval=False)
    silent = Silent(trainer)
    own, calls = trainer.evaluation_loop, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return own(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluation_loop", failing)
    with pytest.raises(MemoryError):
        trainer.train()
    silent.seen = []
    logged = trainer.evaluate()
    assert not silent.take()
    assert {"eval_loss", "eval_mean_token_accuracy"} <= logged.keys()


@pytest.mark.parametrize("mode", [None, "lesion"])
def test_a_mask_that_is_put_on_by_hand_is_not_switched(make, mode):
    """An evaluation that is to run masked leaves all masks as they are."""
    trainer = make(mask_mode=mode)
    plain = trainer.evaluate()["eval_loss"]
    with lesion(trainer.model, ~trainer.neuron_mask):
        assert trainer.evaluate()["eval_loss"] != plain
    assert trainer.evaluate()["eval_loss"] == plain


def test_trainers_in_turn_on_one_model_train_each_its_own_neurons(make):
    model = tiny_model("llama")
    for numbers in ([0], [1]):
        trainer = make(None, model=model, method="full", ica_component_ids=numbers)
        before = state(model)
        trainer.train()
        changed, others = changed_neurons(find_neuron_sites(model), before, state(model))
        assert changed == trainer.trainable_neurons
        assert others == []


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_full_fine_tuning_of_weights_that_were_loaded_into_the_trainer(make, times):
    """It is the run of a trainer that was made with these weights; training twice is, too."""
    runs = []
    for loads in (False, True):
        trainer = make(None, model=tiny_model("llama", seed=0 if loads else 1), method="full")
        if loads:
            trainer.model.load_state_dict(state(tiny_model("llama", seed=1)))
        set_seed(3)
        for _ in range(times):
            trainer.train()
        runs.append(state(trainer.model))
        changed, others = changed_neurons(
            find_neuron_sites(trainer.model), state(tiny_model("llama", seed=1)), state(trainer.model)
        )
        assert (changed, others) == (trainer.trainable_neurons, [])
    assert changed_entries(*runs) == {}
