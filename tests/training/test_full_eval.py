"""Evaluations in half precision leave the weights as they are, and give the numbers of the cast weights."""

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, medium_model, sft_config, state, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, NeuronTunerConfig
from fnsft_trl.training.engines import Engine
from fnsft_trl.training.full_eval import weights_kept
from fnsft_trl.tuner import NeuronDeltaLayer


METHODS = ("neuron_delta", "lora", "both", "full")


def make(directory, method, rows, tokenizer, template, network=None, **args):
    lora = {"lora": LoraConfig(r=2), "both": LoraConfig(r=2, target_modules=["q_proj"])}.get(method)
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory, **args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        peft_config=lora,
        network_config=FunctionalNetworkConfig(
            train_method="neuron_delta" if method == "both" else method, **(network or {})
        ),
        network_template=template,
    )


def contents(model):
    """All parameters and buffers of a model, by name, those that no state dict holds too."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_full_eval", "fp16_full_eval"])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_after_an_evaluation_are_those_before_it(templates, rows, tokenizer, tmp_path, method, precision):
    trainer = make(
        tmp_path / "run", method, rows, tokenizer, templates["llama"], {"mask_mode": "lesion"}, **{precision: True}
    )
    plain = make(tmp_path / "plain", method, rows, tokenizer, templates["llama"], {"mask_mode": "lesion"})
    trainer.evaluate()  # a training after it is that without it
    for each in (trainer, plain):
        each.train()  # which ends with two evaluations
    before = state(trainer.model)
    assert changed_entries(before, state(plain.model)) == {}
    loss = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == loss == predicted.metrics["test_loss"]
    assert changed_entries(before, state(trainer.model)) == {}
    trainer.save_model()
    plain.save_model()
    for file in (tmp_path / "run").glob("*model.safetensors"):
        saved, expected = load_file(file), load_file(tmp_path / "plain" / file.name)
        assert {name: value.dtype for name, value in saved.items()} == dict.fromkeys(expected, torch.float32)
        assert changed_entries(expected, saved) == {}
    trainer.keeps_weights = False
    assert trainer.evaluate()["eval_loss"] == loss  # of weights that are cast, and stay so
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16 if "bf" in precision else torch.float16}
    assert loss != plain.evaluate()["eval_loss"]


def test_weights_in_few_bits_are_left_alone_too(rows, tokenizer, medium_template, tmp_path):
    pytest.importorskip("bitsandbytes")
    medium_model().save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = FNSFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised),
        args=sft_config(tmp_path / "out", bf16_full_eval=True),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(),
        network_template=medium_template,
    )
    trainer.train()
    before = contents(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    assert changed_entries(before, contents(trainer.model)) == {}
    assert trainer.evaluate()["eval_loss"] == loss


def test_sharded_weights_could_not_be_put_back(templates, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "of_args", lambda args: Engine("FSDP2"))
    with pytest.raises(FNSFTError, match="bf16_full_eval or fp16_full_eval does not run under FSDP2"):
        make(tmp_path, "lora", rows, tokenizer, templates["llama"], bf16_full_eval=True)


class Tied(nn.Module):
    """Weights of several precisions, tied ones, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4, dtype=torch.float64)
        self.first.bias, self.alone = self.second.bias, nn.ParameterDict({"a": torch.randn(2)})
        self.register_buffer("mean", torch.randn(3), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.norm = nn.BatchNorm1d(2)


@settings(max_examples=30)
@given(
    casts=st.lists(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]), max_size=3),
    with_gradients=st.booleans(),
    fails=st.booleans(),
    is_replaced=st.booleans(),
)
def test_whatever_the_block_does_the_tensors_are_what_they_were(casts, with_gradients, fails, is_replaced):
    model = Tied()
    if with_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    before, parameters = contents(model), dict(model.named_parameters())
    gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    try:
        with weights_kept(model):
            for dtype in casts:
                model.to(dtype)
            if is_replaced:
                model.first.weight = nn.Parameter(torch.zeros(4, 3))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert changed_entries(before, contents(model)) == {}
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.dtype == before[name].dtype
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)
    assert model.first.bias is model.second.bias


def test_deltas_that_are_merged_or_not_come_back_whole():
    model = tiny_model("llama")
    ids = torch.arange(3, 12)[None]
    base = state(model)
    model = get_peft_model(model, NeuronTunerConfig(neurons={"0": "0-5", "2": "7,9"}, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name:
                parameter.normal_()
    model.eval()
    expected = model(ids).logits
    with weights_kept(model):
        model.to(torch.bfloat16)
        assert not torch.equal(model(ids).logits.float(), expected)
    assert torch.equal(model(ids).logits, expected)

    model.merge_adapter()
    expected = model(ids).logits
    with weights_kept(model):
        model.to(torch.bfloat16)
        model(ids)
    assert torch.equal(model(ids).logits, expected)
    model.unmerge_adapter()
    for module in model.modules():
        if isinstance(module, NeuronDeltaLayer):
            module.release()
    found = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(found[name], value) for name, value in base.items())
