"""Replay: a share of each batch, the same rows for a seed, on from a checkpoint, packed and not."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, state, tiny_model
from peft import LoraConfig
from torch import nn
from trl import DPOConfig, DPOTrainer

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, ReplayConfig, RetentionConfig, with_networks
from fnsft_trl.training.replay import ReplaySampler


@pytest.fixture
def kept(tmp_path):
    """Two texts to replay: lines, and questions with answers."""
    (tmp_path / "wiki.txt").write_text("".join(f"The red fox went {n} times to the sea\n" for n in range(7)))
    rows = [{"question": f"Say ko{n}", "answer": f"{n}ok"} for n in range(4)]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"wiki={tmp_path / 'wiki.txt'}", f"old={tmp_path / 'old.jsonl'}"]


@pytest.fixture
def make(rows, tokenizer, templates, tmp_path):
    def make(kept, name="out", *, method=None, share=0.25, retention=None, data=None, **args):
        networks = {
            "network_config": FunctionalNetworkConfig(train_method=method or "auto"),
            "network_template": templates["llama"],
            "peft_config": LoraConfig(r=2) if method == "lora" else None,
        }
        return FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path / name, **{"max_length": 64, **args}),
            train_dataset=Dataset.from_list(rows[:12]) if data is None else data,
            processing_class=tokenizer,
            replay=kept and ReplayConfig(replay_datasets=kept, replay_share=share),
            retention=retention,
            **(networks if method else {}),
        )

    return make


# The order


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_any_batch_holds_the_share_and_an_epoch_each_row_of_the_task_once(share):
    sampler = ReplaySampler(37, 5, share=share, seed=3)
    epochs = [list(sampler) for _ in range(4)]
    for order in epochs:
        assert len(order) == len(sampler)
        assert sorted(number for number in order if number < 37) == list(range(37))
        for size in (2, 4, 8):
            for first in range(0, len(order) - size + 1, size):
                replayed = sum(number >= 37 for number in order[first : first + size])
                assert abs(replayed - share * size) < 1
    others = [number for order in epochs for number in order if number >= 37]
    assert abs(len(others) / sum(map(len, epochs)) - share) < 0.02
    # each row as often as any other, whether epochs end or not
    counts = Counter(others)
    assert max(counts.values()) - min(counts.get(number, 0) for number in range(37, 42)) <= 1
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second, other = (ReplaySampler(20, 6, share=0.2, seed=seed) for seed in (1, 1, 2))
    orders = [list(first) for _ in range(3)]
    second.set_epoch(2)
    assert list(second) == orders[2]
    assert list(other) != orders[0]


# The loss, by hand: L = (1 - r) L_T + r L_M over the learnt tokens


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_batch_is_that_of_its_rows(make, kept, packing):
    packed = {"packing": True, "packing_strategy": "wrapped", "max_length": 16} if packing else {}
    trainer = make(kept[:1], share=0.5, max_steps=1, **packed)
    assert len(trainer.replay.task) + trainer.replay.replayed == len(trainer.train_dataset)
    order = list(trainer.replay.sampler(trainer.args.seed))[:4]
    parts = {"task": [], "replayed": []}
    for number in order:
        parts["task" if number < len(trainer.replay.task) else "replayed"].append(trainer.train_dataset[number])
    assert [len(rows) for rows in parts.values()] == [2, 2]
    sums, model = [], tiny_model("llama")
    for row in parts["task"] + parts["replayed"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        places, start = torch.arange(ids.shape[1])[None], 0
        for length in row.get("seq_lengths") or [ids.shape[1]]:
            places[0, start : start + length] = torch.arange(length)
            labels[start] = -100  # no one's next token
            start += length
        with torch.no_grad():
            logits = nn.functional.log_softmax(model(ids, position_ids=places).logits[0, :-1], -1)
        learnt = labels[1:] != -100
        sums.append((-logits[learnt].gather(1, labels[1:][learnt][:, None]).sum(), int(learnt.sum())))
    total = sum(count for _, count in sums)
    of_task, of_replay = (sum(nll for nll, _ in part) for part in (sums[:2], sums[2:]))
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(float(of_task + of_replay) / total, abs=2e-4)


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(make, kept, tmp_path, method):
    """In the second epoch, in the middle of it: 12 rows of the task and 4 others are 4 batches."""
    saved = {"save_strategy": "steps", "save_steps": 6, "max_steps": 8}
    whole = make(kept, "whole", method=method, **saved)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed = make(kept, "other", method=method, **saved)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found = state(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in state(whole.model).items())
    results = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert results["epoch"] == 1.5
    other = make(kept, "other", method=method, share=0.5, **saved)
    with pytest.raises(FNSFTError, match="replay was"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_what_is_measured_of_the_task_is_not_what_is_replayed(make, kept, tmp_path):
    texts = RetentionConfig(retention_datasets=kept[:1], retention_tokens=40)
    trainer = make(kept, retention=texts, max_steps=1)
    assert len(trainer.task_dataset) == 12 < len(trainer.train_dataset)
    trainer.train()
    trainer.save_model()
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["replay"] == {"share": 0.25, "rows": {"wiki": 7, "old": 4}}


def test_without_rows_to_replay_nothing_changes(make, kept):
    assert make(None).replay is None
    assert not isinstance(make(None)._get_train_sampler(), ReplaySampler)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replay_share": 0.5}, "replay_share has no effect without replay_datasets"),
        ({"replay_datasets": ["a=x.txt"], "replay_share": 1.0}, "replay_share is 1.0"),
        ({"replay_datasets": ["a=x.txt", "a=y.txt"]}, "names 'a' twice"),
    ],
)
def test_a_config_without_effect_is_an_error(given, message):
    with pytest.raises(FNSFTError, match=message):
        ReplayConfig(**given)


def test_what_cannot_be_replayed_is_refused(make, kept, tmp_path, rows):
    stream = Dataset.from_list(rows).to_iterable_dataset()
    for changes, message in (
        ({"data": stream}, "streamed"),
        ({"train_sampling_strategy": "group_by_length"}, "drop train_sampling_strategy=group_by_length"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "drop skip_prepare_dataset"),
        ({"data": Dataset.from_list(rows[:3]), "share": 0.1}, "an epoch of 3 rows of the task replays none"),
    ):
        with pytest.raises(FNSFTError, match=message):
            make(kept, **changes)
    with pytest.raises(FNSFTError, match="DPOTrainer does not; drop them, or keep the model near its base"):
        with_networks(DPOTrainer)(
            model=tiny_model("llama"),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            replay=ReplayConfig(replay_datasets=kept),
        )
