"""A long run keeps no more as it goes on: memory, handles, threads, hooks; and many trainers leave nothing behind."""

import gc
import os
import threading
import weakref

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, MaskPhase, MaskScheduleCallback, RetentionCallback


pytestmark = pytest.mark.slow

# `make faults` asks for all of it.
STEPS = int(os.environ.get("FNSFT_SOAK_STEPS", "120"))
TRAINERS = int(os.environ.get("FNSFT_SOAK_TRAINERS", "10"))
FLAT = 0.02  # MiB a step: allocators keep pieces, a leak of one batch of activations would be far more


def hooks(model: torch.nn.Module) -> int:
    """How many hooks a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class Noted(TrainerCallback):
    """Notes after every twentieth step what the process holds."""

    def __init__(self) -> None:
        self.rows = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % 20 == 0:
            gc.collect()
            process = psutil.Process()
            memory = process.memory_info().rss / 2**20
            self.rows.append((state.global_step, memory, process.num_fds(), threading.active_count(), hooks(model)))


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_long_run_holds_no_more_at_its_end_than_early_on(method, templates, rows, tmp_path, record_property):
    """With evaluations, checkpoints, retention, the guard, and a mask that comes and goes."""
    args = {"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps"}
    args |= {"save_steps": 40, "save_total_limit": 1, "logging_steps": 10}
    trainer = FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(tmp_path, **args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(
            train_method=method, ica_fraction=0.3, mask_mode="lesion", train_neurons="unselected"
        ),
        network_template=templates["llama"],
    )
    phases = [MaskPhase(0.1), MaskPhase(0.5, "lesion")]
    trainer.add_callback(MaskScheduleCallback(trainer, phases))
    trainer.add_callback(RetentionCallback(trainer, [row["prompt"] for row in rows[:8]], max_tokens=60))
    noted = Noted()
    trainer.add_callback(noted)
    trainer.train()
    half = noted.rows[len(noted.rows) // 3 :]
    steps, memory, handles, threads, found = map(np.array, zip(*half, strict=True))
    slope = np.polyfit(steps, memory, 1)[0]
    record_property("MiB a step", round(float(slope), 5))
    assert len(half) > 3
    assert slope < FLAT
    assert handles.max() - handles.min() <= 2
    assert len(set(threads)) == 1
    assert len(set(found)) == 1


def test_many_trainers_leave_nothing_behind(templates, rows, tmp_path, record_property):
    def train(number: int) -> weakref.ref:
        trainer = FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path / str(number % 2), max_steps=1),
            train_dataset=Dataset.from_list(rows[:8]),
            processing_class=tiny_tokenizer(),
            network_config=FunctionalNetworkConfig(ica_fraction=0.3),
            network_template=templates["llama"],
        )
        trainer.train()
        return weakref.ref(trainer.model)

    memory, handles, alive = [], [], []
    for number in range(TRAINERS):
        alive.append(train(number))
        gc.collect()
        memory.append(psutil.Process().memory_info().rss / 2**20)
        handles.append(psutil.Process().num_fds())
    assert [model() for model in alive] == [None] * TRAINERS
    later = slice(TRAINERS // 3, None)
    slope = np.polyfit(range(TRAINERS)[later], memory[later], 1)[0]
    record_property("MiB a trainer", round(float(slope), 3))
    assert slope < 1
    assert max(handles[later]) - min(handles[later]) <= 2
