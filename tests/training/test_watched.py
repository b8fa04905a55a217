"""Batches without a label are counted; where none has one, training and evaluation end in an error."""

import math

import pytest
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig


TAUGHT = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
# Rows without a token that has a label, as data that are tokenised already bring them.
UNTAUGHT = [
    {"input_ids": [5], "labels": [5]},  # no one's next token
    {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
    {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},
]


AS_THEY_ARE = {"dataset_kwargs": {"skip_prepare_dataset": True}}  # preparing leaves such rows out, where it can


def make(directory, train, tokenizer, template, *, evaluated=None, is_streamed=False, **args):
    data = Dataset.from_list(train)
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory, **{"per_device_train_batch_size": 1, **AS_THEY_ARE, **args}),
        train_dataset=data.to_iterable_dataset() if is_streamed else data,
        eval_dataset=Dataset.from_list(evaluated or [TAUGHT]),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(),
        network_template=template,
    )


@pytest.mark.slow
@pytest.mark.parametrize("args", [{}, {"padding_free": True, "max_length": None}], ids=str)
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("row", UNTAUGHT, ids=str)
def test_a_training_without_a_label_is_an_error_and_nothing_is_saved(
    templates, tokenizer, tmp_path, row, args, is_streamed
):
    trainer = make(
        tmp_path, [row] * 12, tokenizer, templates["llama"], is_streamed=is_streamed, save_strategy="steps", **args
    )
    with pytest.raises(FNSFTError, match=r"none of the \d batches of the training.* holds a token with a label"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_batches_without_a_label_are_counted(templates, tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, message, *a, **k: said.append(str(message)))
    rows = [TAUGHT, UNTAUGHT[0], TAUGHT, UNTAUGHT[1]]
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], evaluated=rows, per_device_eval_batch_size=1)
    before = state(trainer.model)
    trainer.train()
    assert changed_entries(before, state(trainer.model))
    trainer.evaluate()
    assert [line for line in said if "hold no token with a label" in line] == [
        "2 of the 4 batches of the training hold no token with a label; each counts in the mean loss with 0.0",
        "2 of the 4 batches of the evaluation hold no token with a label; each counts in the mean loss with 0.0",
    ]
    said.clear()
    trainer.train()  # counts anew
    assert [line for line in said if line.startswith("2 of the 4 batches of the training")]


def test_losses_of_an_evaluation_that_are_not_finite_are_counted(templates, tokenizer, tmp_path, monkeypatch):
    """transformers leaves them out of the mean."""
    said = []
    monkeypatch.setattr("fnsft_trl.training.watched.logger.warning", said.append)
    trainer = make(
        tmp_path, [TAUGHT] * 4, tokenizer, templates["llama"], evaluated=[TAUGHT] * 3, per_device_eval_batch_size=1
    )
    expected = trainer.evaluate()["eval_loss"]
    own, seen = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        seen.append(None)
        return own(*args, **kwargs) * (math.nan if len(seen) == 2 else 1)

    trainer.compute_loss = compute_loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)
    assert said == ["1 of the 3 batches of the evaluation give a loss that is not finite"]


@pytest.mark.parametrize("row", UNTAUGHT, ids=str)
def test_an_evaluation_without_a_label_is_an_error(templates, tokenizer, tmp_path, row):
    trainer = make(tmp_path, [TAUGHT] * 4, tokenizer, templates["llama"], evaluated=[row] * 3)
    with pytest.raises(FNSFTError, match="none of the 1 batches of the evaluation holds a token with a label"):
        trainer.evaluate()
    trainer.train()
    trainer.predict(Dataset.from_list([row] * 3))  # asks for no loss


def test_complete_data_are_trained_and_evaluated_without_a_word(templates, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fnsft_trl.training.watched.logger.warning", pytest.fail)
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], evaluated=rows[:4], dataset_kwargs=None)
    trainer.train()
    trainer.evaluate()
