"""What reaches an experiment tracker: all numbers of this package go through the Trainer's log."""

from datasets import Dataset
from helpers import sft_config, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import SFTConfig

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, RetentionCallback


def train(directory, rows, tokenizer, template, **args):
    trainer = FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory, eval_strategy="steps", eval_steps=2, **args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(mask_mode="lesion"),
        network_template=template,
    )
    trainer.add_callback(RetentionCallback(trainer, [row["completion"] * 9 for row in rows], max_tokens=60))
    trainer.train()
    return trainer


def test_a_tracker_gets_the_loss_retention_and_both_evaluations(templates, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(tmp_path / "out", rows, tokenizer, templates["llama"], report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"train/loss", "eval/loss", "eval/masked_loss", "eval/unmasked_loss"}
    assert expected | {f"train/retention/{name}" for name in ("base", "cross_entropy", "rise")} <= tags
    logged = [
        (entry["step"], entry["retention/rise"]) for entry in trainer.state.log_history if "retention/rise" in entry
    ]
    seen = [(event.step, event.value) for event in events.Scalars("train/retention/rise")]
    assert [step for step, _ in seen] == [step for step, _ in logged]
    assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(seen, logged, strict=True))


def test_no_tracker_is_on_by_default(templates, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    default = SFTConfig(str(tmp_path / "unused"), use_cpu=True, bf16=False).report_to
    assert default == []
    train(tmp_path / "out", rows, tokenizer, templates["llama"], report_to=default)
    assert not (tmp_path / "events").exists()
