"""How other libraries see a model with neuron deltas: names of its parameters, files, references of trainers."""

import copy
import json
import math
import re

import pytest
import torch
import trl
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import VOCABULARY, random_mask, tiny_model, tiny_rows, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.tuner import NeuronDeltaLayer


EXPERTS = {architecture.name: architecture.model for architecture in ARCHITECTURES if not architecture.dense}
MODELS = {"dense": lambda: tiny_model("llama"), "experts": EXPERTS["MixtralForCausalLM"]}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# What an adapter may train beside its deltas.
BESIDE = {
    "deltas alone": {},
    "LoRA": {"lora": LORA},
    "DoRA": {"lora": {**LORA, "use_dora": True}},
    "LoRA with biases": {"lora": {**LORA, "lora_bias": True}},
    "the head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 7]}},
    "all": {"lora": LORA, "modules_to_save": ["lm_head"]},
}
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def wrap(base, **options):
    """The model with random values in everything that trains."""
    base.config.router_aux_loss_coef = 0.0  # trainers add the loss of a router to theirs
    mask = random_mask(base, "mlp_intermediate")
    config = NeuronTunerConfig(neurons=mask.to_ranges(), task_type="CAUSAL_LM", **options)
    model, generator = get_peft_model(base, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(params=BESIDE)
def beside(request):
    return request.param


# References of trainers

PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in tiny_rows()
]
COMMON = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "logging_steps": 1, "save_strategy": "no"},
    **{"gradient_checkpointing": False, "disable_tqdm": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["deltas alone", "LoRA"])
def test_dpo_from_a_trained_adapter_begins_at_ln_2(kind, options, tmp_path):
    """Its reference is a copy of the adapter, under another name, and not the base model."""
    model = wrap(MODELS[kind](), **options)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_length=40, **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_kto_from_a_trained_adapter_begins_at_one_half(kind, tmp_path):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": bool(i % 2)} for i, r in enumerate(PAIRS)]
    trainer = trl.KTOTrainer(
        model=wrap(MODELS[kind]()),
        args=trl.KTOConfig(output_dir=str(tmp_path), max_length=40, per_device_train_batch_size=4, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-5)


def test_a_copy_of_an_adapter_by_the_names_of_its_parameters_is_the_adapter(kind, beside):
    """As TRL makes references: what is named `.default.` is copied to the same name with another adapter's."""
    if "trainable_token_indices" in BESIDE[beside]:
        pytest.skip("the name of a token's row ends with the adapter's, in LoRA too")
    model = wrap(MODELS[kind](), **BESIDE[beside])
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    assert all(
        ".default." in name for name, p in model.named_parameters() if "neuron_delta" in name and ".ref." not in name
    )


# Files


def test_files_keep_the_names_that_they_have_always_had(kind, beside, tmp_path):
    model = wrap(MODELS[kind](), **BESIDE[beside])
    model.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "neuron_delta" in name]
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, NeuronDeltaLayer)]
    assert sorted(names) == sorted(
        f"{name}.neuron_delta_{parameter}" for name, layer in layers for parameter in layer.slices["default"]
    )


@pytest.mark.parametrize("adapter", ["default", "weight", "neuron_delta_weight", "1"])
def test_an_adapter_of_any_name_is_saved_and_loaded(adapter, tmp_path):
    model = wrap(tiny_model("llama"), lora=LORA)
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "first", adapter_name=adapter)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    where = tmp_path / "second" / ("" if adapter == "default" else adapter)
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    second = load_file(where / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_transformers_loader_loads_what_peft_does(kind, beside, tmp_path):
    """`AutoModel.from_pretrained` of an adapter's folder, and `load_adapter` beside another adapter."""
    MODELS[kind]().save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **BESIDE[beside])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    own = get_peft_model_state_dict(model)
    again = loaded.get_adapter_state_dict("default")
    prefix = "base_model.model."
    assert {name.removeprefix(prefix) for name in own} == {name.removeprefix(prefix) for name in again}

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    base.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=1e-5)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), plain, atol=1e-5, rtol=1e-5)


def test_transformers_loader_still_loads_plain_lora(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False, task_type="CAUSAL_LM"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_what_reads_bare_parameters_after_a_merge_finds_a_plain_models_names_and_values(kind):
    """As TRL sends weights to vLLM: merged, without what has the method's prefix in its name."""
    model = wrap(MODELS[kind]())
    whole = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    sent = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name:
            sent[name] = parameter.detach().clone()
    model.unmerge_adapter()
    expected = dict(whole.named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in sent)


def test_the_configuration_is_found_where_it_was(tmp_path):
    wrap(tiny_model("llama"), lora=LORA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NEURON_DELTA"
    assert re.fullmatch(r"[\d,-]+", config["neurons"]["0"])
