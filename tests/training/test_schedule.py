"""MaskScheduleCallback: masks and trainable neurons that change in the middle of training."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, changed_entries, random_mask, sft_config, state, tiny_model
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    MaskPhase,
    MaskScheduleCallback,
    find_neuron_sites,
)
from fnsft_trl.constraints import FrozenSlices
from fnsft_trl.export import changed_neurons


def make(directory, rows, tokenizer, template, phases, *, method="full", model=None, args=None, **config):
    trainer = FNSFTTrainer(
        model=model or tiny_model("llama"),
        args=sft_config(directory, **{"max_steps": 6, **(args or {})}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method, **config),
        network_template=template,
    )
    if phases:
        trainer.add_callback(MaskScheduleCallback(trainer, phases(trainer) if callable(phases) else phases))
    return trainer


class Recorder(TrainerCallback):
    """Copies of the weights, and the neurons silent in every token, of every step."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.silent = trainer, [], []
        self._seen = {}
        for site in find_neuron_sites(trainer.model):  # after the masks, so it sees what they let through
            site.down.register_forward_pre_hook(self._hook(site.layer))

    def _hook(self, layer):
        def hook(module, args):
            if module.training:
                self._seen[layer] = (args[0] == 0).flatten(0, -2).all(0)

        return hook

    def on_step_begin(self, args, state_, control, **kwargs):
        self.weights.append(state(self.trainer.model))

    def on_step_end(self, args, state_, control, **kwargs):
        self.silent.append({layer: silent.clone() for layer, silent in self._seen.items()})
        self.last = state(self.trainer.model)


def record(trainer):
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder, [*recorder.weights, recorder.last]


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_the_forward_mask_switches_at_the_steps_it_is_told(templates, rows, tokenizer, tmp_path, method):
    other = random_mask(tiny_model("llama"), "mlp_intermediate", seed=5)
    phases = [MaskPhase(2, "lesion", other), MaskPhase(0.5), MaskPhase(4, "preserve")]
    trainer = make(
        tmp_path, rows, tokenizer, templates["llama"], phases, method=method, mask_mode="lesion",
        train_neurons="unselected" if method == "full" else "all",
    )  # fmt: skip
    recorder, _ = record(trainer)
    own = trainer.neuron_mask
    for silent, expected in zip(recorder.silent, [own, own, other, own & ~own, ~own, ~own], strict=True):
        for layer, members in expected.layers.items():
            assert torch.equal(silent[layer], members)
    # Training ends under the last phase's mask.
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["eval_masked_loss"] != logged["eval_unmasked_loss"]
    assert trainer.evaluate()["eval_loss"] == logged["eval_masked_loss"]


def two_phases(trainer):
    """All neurons of the run for 2 steps, then half of them for 2, then the other half."""
    half = random_mask(tiny_model("llama"), "mlp_intermediate", 0.5, seed=1)
    run = trainer.trainable_neurons
    return [MaskPhase(2, trainable=run & half), MaskPhase(4, trainable=run & ~half)]


def check_phases(weights, trainer, phases):
    """What changed in each phase, from the weights before its first step to those after its last."""
    sites = find_neuron_sites(tiny_model("llama"))
    starts = [0, *(phase.start for phase in phases), len(weights) - 1]
    expected = [trainer.trainable_neurons, *(phase.trainable for phase in phases)]
    for first, last, trainable in zip(starts, starts[1:], expected, strict=False):
        changed, _ = changed_neurons(sites, weights[first], weights[last])
        assert changed == trainable


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
    "lion": {"optim": "lion_32bit"},
    "ademamix": {"optim": "ademamix"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "train"), [*((name, "selected") for name in OPTIMIZERS), ("adamw", "unselected")]
)
def test_what_a_phase_freezes_is_bit_identical_through_it(templates, rows, tokenizer, tmp_path, optimizer, train):
    if optimizer in ("lion", "ademamix"):
        pytest.importorskip("bitsandbytes")
    trainer = make(
        tmp_path, rows, tokenizer, templates["llama"], two_phases, args=OPTIMIZERS[optimizer], train_neurons=train
    )
    _, weights = record(trainer)
    check_phases(weights, trainer, two_phases(trainer))


def test_without_putting_values_back_momentum_and_decay_move_them(templates, rows, tokenizer, tmp_path, monkeypatch):
    """The control: with masked gradients alone, what the phase freezes drifts."""
    monkeypatch.setattr(FrozenSlices, "restore", lambda self: None)
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], two_phases, frozen_guard=False)
    _, weights = record(trainer)
    first, _ = two_phases(trainer)
    changed, _ = changed_neurons(find_neuron_sites(tiny_model("llama")), weights[2], weights[4])
    assert (changed & trainer.trainable_neurons & ~first.trainable).count


class Momenta(TrainerCallback):
    """The momentum of one parameter when a step begins."""

    def __init__(self, parameter, name):
        self.parameter, self.name, self.seen = parameter, name, []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        entries = optimizer.state.get(self.parameter, {})
        value = entries.get(self.name, torch.zeros(1))
        self.seen.append(entries["qmap1"][value.int()] if value.dtype == torch.uint8 else value.clone())


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_the_momentum_of_newly_frozen_neurons_is_cleared(rows, tokenizer, tmp_path, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **shape))
    half = random_mask(model, "mlp_intermediate", 0.5, seed=1)
    trainer = make(
        tmp_path, rows, tokenizer, None, lambda t: [MaskPhase(2, trainable=t.trainable_neurons & half)], model=model,
        args={"optim": optimizer, "max_steps": 3}, ica_components=2, ica_rank=8, ica_max_tokens=200,
        ica_max_length=32, ica_fraction=0.5,
    )  # fmt: skip
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    momenta = Momenta(parameter, "exp_avg" if optimizer == "adamw_torch" else "state1")
    trainer.add_callback(momenta)
    trainer.train()
    frozen = (trainer.trainable_neurons & ~half).indices(0)
    going = (trainer.trainable_neurons & half).indices(0)
    _, before, after = momenta.seen  # at the second step, and at the third, when the phase begins
    assert before[frozen].any(1).all()
    assert not after[frozen].any()
    assert after[going].any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumed_in_or_between_phases_equals_the_uninterrupted_one(templates, rows, tokenizer, tmp_path, step):
    args = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    lesioned = random_mask(tiny_model("llama"), "mlp_intermediate", 0.2, seed=7)

    def phases(trainer):
        first, second = two_phases(trainer)
        return [MaskPhase(2, "lesion", lesioned, first.trainable), second]

    whole = make(tmp_path / "whole", rows, tokenizer, templates["llama"], phases, args=args)
    whole.train()
    resumed = make(tmp_path / "resumed", rows, tokenizer, templates["llama"], phases, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    plain = make(tmp_path / "plain", rows, tokenizer, templates["llama"], None, args=args)
    plain.train()
    assert changed_entries(state(whole.model), state(plain.model))


@pytest.mark.slow
def test_a_phase_that_cannot_be_meant_is_refused(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], None)
    run = trainer.trainable_neurons
    for phases, message in (
        ([], "without phases"),
        ([MaskPhase(1.0)], "no fraction"),
        ([MaskPhase(-1)], "no step"),
        *(([MaskPhase(start)], "no step") for start in ("1", None, True, math.nan, [1], np.float64(1), np.int64(-1))),
        (MaskPhase(1), "expected a list of MaskPhase"),
        ([1, 2], "expected a list of MaskPhase"),
        ([MaskPhase(1, "lesion", {})], "mask of a phase is a dict"),
        ([MaskPhase(1, trainable="all")], "trainable of a phase is a str"),
        ([MaskPhase(1, "erase")], "unknown"),
        ([MaskPhase(1, None, run)], "masks nothing"),
        ([MaskPhase(1, trainable=~run)], "holds frozen throughout"),
        ([MaskPhase(1, trainable=run & ~run)], "nothing that could learn"),
        ([MaskPhase(1, "lesion")], "nothing that could learn"),
        ([MaskPhase(1, "lesion", random_mask(tiny_model("llama"), "mlp_output"))], "do not combine"),
    ):
        with pytest.raises(FNSFTError, match=message):
            MaskScheduleCallback(trainer, phases)
    phases = MaskScheduleCallback(trainer, [MaskPhase(np.float32(0.5), "preserve"), MaskPhase(np.int64(4))]).phases
    assert [(phase.start, type(phase.start)) for phase in phases] == [(0.5, float), (4, int)]
    deltas = make(tmp_path, rows, tokenizer, templates["llama"], None, method="neuron_delta")
    with pytest.raises(FNSFTError, match="of full fine-tuning only, not of neuron_delta"):
        MaskScheduleCallback(deltas, [MaskPhase(1, trainable=deltas.trainable_neurons)])
    for phases, message in (
        ([MaskPhase(3), MaskPhase(0.2)], "3, 1 of 6"),
        ([MaskPhase(6)], "ends at step 6"),
    ):
        trainer = make(tmp_path, rows, tokenizer, templates["llama"], phases)
        with pytest.raises(FNSFTError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_run_resumes_only_with_the_phases_of_its_checkpoint(templates, rows, tokenizer, tmp_path):
    def phases(start):
        return [MaskPhase(start, mask_mode="lesion")]

    args = {"save_strategy": "steps", "save_steps": 3}
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], phases(2), args=args, train_neurons="unselected")
    trainer.train()
    for other in (None, phases(4)):
        resumed = make(tmp_path, rows, tokenizer, templates["llama"], other, args=args, train_neurons="unselected")
        with pytest.raises(FNSFTError, match=r"mask_phases was .* and is now"):
            resumed.train(resume_from_checkpoint=True)
