"""KL to the base: the loss and the gradient that the paper says, in every way of training, on from a checkpoint."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, state, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from fnsft_trl import AnchorConfig, FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, with_networks
from fnsft_trl.evaluation.kl import StoredBase
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.interventions import masks_off
from fnsft_trl.training.anchor import KLToBase
from fnsft_trl.training.same_run import run_settings


@pytest.fixture
def text(tmp_path):
    (tmp_path / "wiki.txt").write_text("".join(f"The red fox went {n} times to the sea\n" for n in range(7)))
    return f"wiki={tmp_path / 'wiki.txt'}"


@pytest.fixture
def make(rows, tokenizer, templates, tmp_path, text):
    def make(name="out", *, method=None, mask_mode=None, weight=5.0, model=None, **args):
        networks = {
            "network_config": FunctionalNetworkConfig(train_method=method or "auto", mask_mode=mask_mode),
            "network_template": templates["llama"],
            "peft_config": LoraConfig(r=2) if method == "lora" else None,
        }
        anchor = AnchorConfig(kl_to_base=weight, kl_datasets=[text], kl_tokens=100) if weight else None
        return FNSFTTrainer(
            model=tiny_model("llama") if model is None else model,
            args=sft_config(tmp_path / name, **args),
            train_dataset=Dataset.from_list(rows[:12]),
            processing_class=tokenizer,
            anchor=anchor,
            **(networks if method else {}),
        )

    return make


class Table(nn.Module):
    """A model of two tokens whose logits are its parameter, whatever it reads."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))

    def disable_adapter(self):
        raise AssertionError("the base is stored")


def test_loss_and_gradient_are_those_worked_out_by_hand(text):
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = (ln 2 + ln 2/3) / 2, and its gradient in the logits is q - p."""
    anchor = KLToBase(AnchorConfig(kl_to_base=2.0, kl_datasets=[text]))
    anchor.text = RetentionText.of_sequences([[0, 1, 1], [1, 0, 1]])
    anchor._stored = StoredBase()
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    with torch.no_grad():
        anchor._stored.keep(Table([0.5, 0.5]), inputs, [0, 1])
    trained = Table([0.25, 0.75])
    kl = anchor.divergence(trained, trained, [0, 1])
    assert float(kl.detach()) == pytest.approx((math.log(2) + math.log(2 / 3)) / 2, abs=1e-6)
    kl.backward()
    torch.testing.assert_close(trained.logits.grad, torch.tensor([-0.25, 0.25]))


def test_other_batches_of_general_text_are_another_run(make):
    """A batch of it goes with each batch of the task, so half batches twice read twice as much of it."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, dealt = make(method="full"), make(method="full", **halves)
    one, two = (run_settings(trainer, given={}, mask_phases=[]) for trainer in (whole, dealt))
    assert one["rows_in_a_step"] == two["rows_in_a_step"]
    assert one["kl_sequences_in_a_step"] * 2 == two["kl_sequences_in_a_step"]


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_the_gradient_of_a_step_is_the_sum_of_both(make, method):
    """At the third step: the gradient with the divergence less that without is w times that of the KL by autograd."""
    trainer = make(method=method, max_steps=2)
    trainer.train()
    kl = [entry["kl_to_base"] for entry in trainer.state.log_history if "kl_to_base" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-5)  # before the first step
    assert kl[1] > 1e-6
    anchor, model = trainer.anchor, trainer.model
    assert anchor.kind == ("top-k" if method == "full" else "exact")

    numbers = anchor._next(trainer)
    base = tiny_model("llama")
    expected = []
    for number in numbers:
        ids = torch.tensor([anchor.text.sequences[number]])
        with torch.no_grad():
            p = base(ids).logits[0, :-1].log_softmax(-1)
        q = model(ids).logits[0, :-1].log_softmax(-1)
        if method == "full":  # the 64 most probable tokens, and all others as one
            top = p.topk(64).indices
            rest = [logs.exp().scatter(-1, top, 0).sum(-1, keepdim=True).log() for logs in (p, q)]
            p, q = (torch.cat([logs.gather(-1, top), other], -1) for logs, other in zip((p, q), rest, strict=True))
        expected.append((p.exp() * (p - q)).sum(-1))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(torch.cat(expected).mean(), trained)

    anchor._at = (anchor._at[0], anchor._at[1] - 1)
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    loss = anchor.step(trainer, model)
    assert float(loss) == pytest.approx(5.0 * anchor.last / 2)
    for parameter, wanted in zip(trained, expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        held = found != 0 if method == "full" else torch.ones_like(found, dtype=torch.bool)  # frozen slices have none
        torch.testing.assert_close(found[held], 2.5 * wanted[held], rtol=1e-3, atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in trainer.model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_mask_does_not_reach_the_gradient(make, checkpointing):
    """Not in the second forward pass either that a checkpoint makes in the backward pass."""
    trainer = make(method="full", mask_mode="lesion", max_steps=3, gradient_checkpointing=checkpointing)
    trainer.train()
    model, found = trainer.model, []
    assert model.is_gradient_checkpointing == checkpointing
    for off in (nullcontext(), masks_off(model)):
        trainer.anchor._at = (-1, 0)
        model.zero_grad()
        with off:
            trainer.anchor.step(trainer, model)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(grad.abs().max() > 1e-4 for grad in found[0].values())
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_model_stays_nearer_to_its_base_and_a_resumed_run_is_the_uninterrupted_one(make, method, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "gradient_accumulation_steps": 2}
    whole = make("whole", method=method, weight=300.0, **saved)
    free = make("free", method=method, weight=1e-9, **saved)
    last = {}
    for name, trainer in (("whole", whole), ("free", free)):
        trainer.train()
        last[name] = [entry["kl_to_base"] for entry in trainer.state.log_history if "kl_to_base" in entry][-1]
    assert last["whole"] < 0.7 * last["free"]
    resumed = make("other", method=method, weight=300.0, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    found = state(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in state(whole.model).items())
    whole.save_model()
    written = json.loads((tmp_path / "whole" / "results.json").read_text())["kl_to_base"]
    assert (written["weight"], written["tokens"], written["base"]) == (300.0, 100, whole.anchor.kind)
    other = make("other", method=method, weight=1.0, **saved)
    with pytest.raises(FNSFTError, match="kl_to_base was"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_of_an_adapter_that_was_trained_before_the_base_is_what_it_predicted(make):
    trained = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = make(max_steps=1, model=trained)
    trainer.train()
    assert trainer.anchor.kind == "top-k"
    first = next(entry["kl_to_base"] for entry in trainer.state.log_history if "kl_to_base" in entry)
    assert first == pytest.approx(0, abs=1e-4)


def test_a_preference_trainer_stays_near_its_base_too(tokenizer, templates, tmp_path, text):
    pairs = [{"prompt": f"Say ba{n}:", "chosen": f" {n}ab.", "rejected": " ko."} for n in range(6)]
    trainer = with_networks(DPOTrainer)(
        model=tiny_model("llama"),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=2, report_to="none", logging_steps=1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(),
        network_template=templates["llama"],
        anchor=AnchorConfig(kl_to_base=1.0, kl_datasets=[text], kl_tokens=60),
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "kl_to_base" in entry] == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_to_base": 1.0}, "no effect without kl_datasets"),
        ({"kl_datasets": ["a=x.txt"]}, "kl_datasets has no effect without kl_to_base"),
        ({"kl_to_base": 0.0, "kl_datasets": ["a=x.txt"]}, "kl_to_base is 0.0"),
    ],
)
def test_a_config_without_effect_is_an_error(given, message):
    with pytest.raises(FNSFTError, match=message):
        AnchorConfig(**given)


def test_what_predicts_no_next_token_is_refused(tmp_path, text):
    with pytest.raises(FNSFTError, match="which a reward model does not predict"):
        with_networks(RewardTrainer)(
            model=tiny_model("llama"),
            args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False),
            anchor=AnchorConfig(kl_to_base=1.0, kl_datasets=[text]),
        )
