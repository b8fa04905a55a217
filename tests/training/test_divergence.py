"""A run that is no longer finite ends before a step writes that into the weights, and saves and pushes nothing."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model
from hub import ALICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig
from fnsft_trl.cli import main
from fnsft_trl.training import TrainingDiverged
from fnsft_trl.training.divergence import all_finite, check_weights


NONE = "no networks"


def make(directory, rows, tokenizer, template, method="neuron_delta", **args):
    networks = {}
    if method != NONE:
        networks = {"network_config": FunctionalNetworkConfig(train_method=method), "network_template": template}
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory, **{"save_strategy": "steps", "save_steps": 1, **args}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        **networks,
    )


def test_of_weights_that_zero3_has_sharded_each_process_looks_at_its_part(monkeypatch):
    """An empty parameter is finite; what this process holds, and what the other one says, is what counts."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_numel, parameter.ds_zero_partition_rank = 0, 3, 1
    parameter.ds_tensor = torch.tensor([1.0, math.nan])  # the last is no entry, but fills the part up
    model = torch.nn.Module()
    model.weight = parameter
    said = []
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda found, own: found.__setitem__(0, *said or [own]))
    check_weights(model)
    said.append("weight")
    with pytest.raises(TrainingDiverged, match="weight is not finite"):
        check_weights(model)
    said.clear()
    parameter.ds_tensor[0] = math.inf
    with pytest.raises(TrainingDiverged, match="weight is not finite"):
        check_weights(model)


class Snapshots(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.of = {}

    def on_step_end(self, args, state_, control, model=None, **kwargs):
        self.of[state_.global_step] = state(model)


def spoil_loss(trainer, value, batch):
    """Add a value to the loss of one batch, counted from 0, and of all that follow."""
    own, seen = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        seen.append(None)
        return own(*args, **kwargs) + (value if len(seen) > batch else 0)

    trainer.compute_loss = compute_loss


def spoil_gradient(trainer, value, batch):
    """Put a value into one entry of the gradient of one weight, of one batch and of all that follow."""
    parameter, seen = [p for p in trainer.model.parameters() if p.requires_grad][-1], []

    def hook(grad):
        seen.append(None)
        if len(seen) > batch:
            grad = grad.clone()
            grad.view(-1)[-1] = value
        return grad

    parameter.register_hook(hook)


@pytest.mark.slow
@settings(max_examples=14)
@example(spoil_loss, math.nan, 0, "neuron_delta", 1, 1.0, False)
@example(spoil_gradient, math.inf, 3, "full", 2, 0.0, True)
@given(
    spoil=st.sampled_from([spoil_loss, spoil_gradient]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    batch=st.integers(0, 3),
    method=st.sampled_from(["neuron_delta", "lora", "full", NONE]),
    accumulation=st.sampled_from([1, 2]),
    clip=st.sampled_from([0.0, 1.0]),
    bf16=st.booleans(),
)
def test_a_run_ends_at_the_first_step_that_is_not_finite(
    templates, rows, tokenizer, spoil, value, batch, method, accumulation, clip, bf16
):
    with tempfile.TemporaryDirectory() as directory:
        args = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip, "bf16": bf16, "max_steps": 6}
        trainer = make(directory, rows, tokenizer, templates["llama"], method, **args)
        trainer.add_callback(snapshots := Snapshots())
        snapshots.of[0] = state(trainer.model)
        spoil(trainer, value, batch)
        step = batch // accumulation + 1
        with pytest.raises(
            TrainingDiverged, match=rf"diverged in step {step}: .*learning rate of {0.01 * (7 - step) / 6:g}"
        ) as error:
            trainer.train()
        assert "\n" not in str(error.value)
        assert max(snapshots.of) == step - 1
        assert changed_entries(snapshots.of[step - 1], state(trainer.model)) == {}
        saved = {int(path.name.partition("-")[2]) for path in Path(directory).glob("checkpoint-*")}
        assert saved == set(range(1, step))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == step - 1
        assert all(losses)


@pytest.mark.parametrize("method", ["neuron_delta", "full", NONE])
def test_weights_that_are_not_finite_are_not_saved(templates, rows, tokenizer, tmp_path, method):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], method)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    trainer.save_model()
    (file,) = tmp_path.glob("*model.safetensors")
    before = file.read_bytes()

    class Vandal(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, **kwargs):
            parameter.view(-1)[0] = math.inf

    trainer.add_callback(Vandal())
    with pytest.raises(TrainingDiverged, match="is not finite, so the model is not saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*"))
    with pytest.raises(TrainingDiverged, match="is not finite"):
        trainer.save_model()
    assert file.read_bytes() == before
    assert all(value.isfinite().all() for value in load_file(file).values())


def test_a_learning_rate_that_is_far_too_high_is_one_line_and_nothing_is_pushed(
    templates, rows, model_dir, tmp_path, hub, capsys
):
    templates["llama"].save_pretrained(tmp_path / "template")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", str(tmp_path / "data.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--max_length", "32", "--max_steps", "3", "--logging_steps", "1"]
    words += ["--ica_template_path", str(tmp_path / "template"), "--use_cpu", "--learning_rate", "1e30"]
    words += ["--push_to_hub", "--hub_model_id", "alice/broken", "--hub_token", ALICE, "--disable_tqdm", "true"]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fnsft train: error: the training diverged in step 2: the loss is nan, at a learning rate")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not [name for name in hub.files("alice/broken") if name.endswith(".safetensors")]


def with_scaler(trainer):
    """As under float16, which accelerate keeps for accelerators."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_gradient_scaler_skips_is_no_end(templates, rows, tokenizer, tmp_path, optim):
    trainer = with_scaler(make(tmp_path, rows, tokenizer, templates["llama"], max_grad_norm=0.0, optim=optim))
    trainer.add_callback(snapshots := Snapshots())
    own, seen = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        seen.append(None)
        return own(*args, **kwargs) * (math.inf if len(seen) == 2 else 1)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert trainer.state.global_step == 4
    assert changed_entries(snapshots.of[1], snapshots.of[2]) == {}
    assert changed_entries(snapshots.of[2], snapshots.of[3])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])  # the second skips steps by itself
@pytest.mark.parametrize(("steps", "told"), [(4, "of all 4 steps"), (60, "of the last 32 steps")])
def test_a_run_of_skipped_steps_alone_is_an_error(templates, rows, tokenizer, tmp_path, steps, told, optim):
    args = {"max_grad_norm": 0.0, "max_steps": steps, "save_strategy": "no", "optim": optim}
    trainer = with_scaler(make(tmp_path, rows, tokenizer, templates["llama"], **args))
    spoil_gradient(trainer, math.inf, 0 if steps == 4 else 2)
    with pytest.raises(TrainingDiverged, match=f"the gradients {told} are not finite"):
        trainer.train()
    assert all_finite(trainer.model.parameters())


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    value=st.sampled_from([0.0, 1.0, "largest", math.nan, math.inf, -math.inf]),
    where=st.integers(0, 99),
)
def test_one_entry_that_is_not_finite_is_found_and_large_ones_are_fine(shapes, dtype, value, where):
    value = torch.finfo(dtype).max if value == "largest" else value
    tensors = [torch.full(shape, 1.0, dtype=dtype) for shape in shapes]
    filled = [tensor for tensor in tensors if tensor.numel()]
    if filled:
        flat = filled[where % len(filled)].view(-1)
        flat[where % len(flat)] = value
    assert all_finite(tensors) == (not filled or math.isfinite(value))


def test_frozen_weights_are_not_looked_at():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.lm_head.requires_grad_(False)
    check_weights(model)
    model.lm_head.requires_grad_(True)
    with pytest.raises(FNSFTError, match=r"lm_head\.weight is not finite"):
        check_weights(model)
