import json
from inspect import signature

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    RetentionCallback,
    find_neuron_sites,
)
from fnsft_trl.export import changed_neurons
from fnsft_trl.training.engines import Engine


try:
    from bitsandbytes.functional import dequantize_4bit
except ImportError:
    dequantize_4bit = None

DISCOVERY = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 32, "ica_percentile": 80}


def make(directory, rows, tokenizer, template=None, *, model=None, args=None, peft_config=None, **config):
    return FNSFTTrainer(
        model=model or tiny_model("llama"),
        args=sft_config(directory, **(args or {})),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        peft_config=peft_config,
        network_config=FunctionalNetworkConfig(**config),
        network_template=template,
    )


def test_it_takes_the_arguments_of_sfttrainer_in_their_order():
    ours, theirs = (list(signature(kind.__init__).parameters) for kind in (FNSFTTrainer, SFTTrainer))
    assert ours[: len(theirs)] == theirs


def test_networks_are_discovered_on_the_training_data_when_none_are_given(model_dir, rows, tmp_path):
    trainer = FNSFTTrainer(
        model=str(model_dir),
        args=sft_config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        network_config=FunctionalNetworkConfig(**DISCOVERY),
    )
    assert trainer.network_template.calibration["sources"] == ["the training data"]
    assert trainer.network_template.calibration["tokens"] == 200
    assert len(trainer.network_template.components) == 2
    assert trainer.neuron_mask.count > 0
    trainer.train()


def test_networks_are_discovered_on_the_named_files(model_dir, rows, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": row["completion"] * 3}) for row in rows))
    trainer = FNSFTTrainer(
        model=str(model_dir),
        args=sft_config(tmp_path / "out"),
        train_dataset=Dataset.from_list(rows),
        network_config=FunctionalNetworkConfig(ica_datasets=[str(file)], **DISCOVERY),
    )
    assert trainer.network_template.calibration["sources"] == [file.name]


@pytest.mark.slow
def test_conversations_and_text_train_too(model_dir, rows, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
    for name, data in (("chats", chats), ("texts", texts)):
        trainer = FNSFTTrainer(
            model=str(model_dir),
            args=sft_config(tmp_path / name, max_length=64),
            train_dataset=Dataset.from_list(data),
            network_config=FunctionalNetworkConfig(**DISCOVERY),
        )
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_every_checkpoint_holds_the_template_and_the_selection(templates, rows, tokenizer, tmp_path, method):
    peft_config = LoraConfig(r=2) if method == "lora" else None
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(
        tmp_path, rows, tokenizer, templates["llama"], args=args, peft_config=peft_config, train_method=method
    )
    trainer.train()
    for step in (2, 4):
        directory = tmp_path / f"checkpoint-{step}" / "functional_networks"
        loaded = FunctionalNetworkTemplate.from_pretrained(directory)
        assert torch.equal(loaded.loadings[1], templates["llama"].loadings[1])
        selection = json.loads((directory / "selection.json").read_text())
        assert selection["selected"] == {"count": trainer.neuron_mask.count, "sha256": trainer.neuron_mask.sha256}
        assert selection["train_method"] == method
        assert FunctionalNetworkConfig(**selection["network_config"]) == trainer.network_config
    if method != "full":
        assert "## Functional networks" in (tmp_path / "checkpoint-4" / "README.md").read_text()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Functional networks") == 1
    assert "functional-networks" in card
    assert f"{trainer.neuron_mask.count} neurons (" in card
    assert ("import fnsft_trl.tuner" in card) == (method == "neuron_delta")


def test_a_template_may_be_a_directory(templates, rows, tokenizer, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "template")
    from_argument = make(tmp_path / "a", rows, tokenizer, tmp_path / "template")
    from_config = make(tmp_path / "b", rows, tokenizer, ica_template_path=str(tmp_path / "template"))
    assert from_argument.neuron_mask == from_config.neuron_mask
    wider = make(tmp_path / "c", rows, tokenizer, tmp_path / "template", ica_percentile=50)
    assert wider.neuron_mask.count > from_config.neuron_mask.count
    assert wider.network_template.threshold.value == 50


def test_a_template_of_another_model_is_refused(templates, rows, tokenizer, tmp_path):
    with pytest.raises(FNSFTError, match="GPT2LMHeadModel"):
        make(tmp_path, rows, tokenizer, templates["gpt2"])


@pytest.mark.parametrize("mask_mode", ["lesion", "preserve"])
@pytest.mark.parametrize("mask_eval", [True, False])
def test_training_ends_with_an_evaluation_with_and_without_the_mask(
    templates, rows, tokenizer, tmp_path, mask_mode, mask_eval
):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], mask_mode=mask_mode, mask_eval=mask_eval)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    masked, unmasked = logged["eval_masked_loss"], logged["eval_unmasked_loss"]
    assert masked != unmasked
    assert trainer.evaluate()["eval_loss"] == (masked if mask_eval else unmasked)
    assert trainer.mask_handle.enabled


@pytest.mark.slow
def test_held_by_the_forward_mask_alone_when_anti_drift_is_off(templates, rows, tokenizer, tmp_path):
    """Without weight decay lesioned neurons get no gradient and stay; with it they drift."""
    for weight_decay, stays in ((0.0, True), (0.1, False)):
        model = tiny_model("llama")
        before = state(model)
        trainer = make(
            tmp_path,
            rows,
            tokenizer,
            templates["llama"],
            model=model,
            args={"weight_decay": weight_decay},
            mask_mode="lesion",
            anti_drift_row_param=False,
            train_method="full",
        )
        trainer.train()
        after = state(trainer.model)
        site = find_neuron_sites(model)[2]
        part = site.layout.slices[-1]
        lesioned = trainer.neuron_mask.indices(2)
        name = f"{part.module_name}.{part.parameter}"
        columns = [weights[name].index_select(part.dim, lesioned) for weights in (before, after)]
        assert torch.equal(*columns) == stays
        assert not torch.equal(before[name], after[name])


def test_an_existing_peft_model_is_held_too(templates, rows, tokenizer, tmp_path):
    model = tiny_model("llama")
    before = state(model)
    targets = ["gate_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], model=wrapped)
    trainer.train()
    after = state(trainer.model.merge_and_unload())
    frozen = (~trainer.neuron_mask).indices(0)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(before[name][frozen], after[name][frozen])
    assert not torch.equal(before[name], after[name])


def test_the_active_adapter_is_the_one_that_is_held(templates, rows, tokenizer, tmp_path):
    model = tiny_model("llama")
    before = state(model)
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("mine", LoraConfig(r=2, target_modules=r"model\.layers\.\d+\.mlp\.down_proj"))
    wrapped.set_adapter("mine")
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], model=wrapped)
    trainer.train()
    after = state(trainer.model.merge_and_unload())
    name = "model.layers.0.mlp.down_proj.weight"
    frozen = (~trainer.neuron_mask).indices(0)
    assert torch.equal(before[name][:, frozen], after[name][:, frozen])
    assert not torch.equal(before[name], after[name])


def test_everything_trainable_still_means_the_mlps(templates, rows, tokenizer, tmp_path):
    trainer = make(
        tmp_path,
        rows,
        tokenizer,
        templates["llama"],
        peft_config=LoraConfig(r=2),
        mask_mode="lesion",
        train_neurons="all",
    )
    names = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in trainer.model.named_parameters() if "lora_" in name
    }
    assert names == {"gate_proj", "up_proj", "down_proj"}


def test_arguments_may_be_given_by_position(templates, rows, tokenizer, tmp_path):
    data = Dataset.from_list(rows)
    config = FunctionalNetworkConfig(**DISCOVERY)
    trainer = FNSFTTrainer(
        tiny_model("llama"), sft_config(tmp_path), None, data, None, tokenizer, network_config=config
    )
    trainer.train()
    assert trainer.network_template.calibration["tokens"] == 200


@pytest.mark.slow
def test_streamed_data_and_other_text_fields_are_discovered_on(model_dir, rows, tmp_path):
    texts = Dataset.from_list([{"content": row["completion"] * 2} for row in rows])
    for data in (texts, texts.to_iterable_dataset()):
        trainer = FNSFTTrainer(
            model=str(model_dir),
            args=sft_config(tmp_path, dataset_text_field="content"),
            train_dataset=data,
            network_config=FunctionalNetworkConfig(**DISCOVERY),
        )
        trainer.train()
        assert trainer.network_template.calibration["tokens"] == 200


def test_what_is_known_to_fail_fails_before_a_discovery(model_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fnsft_trl.training.preparation.discover_networks", lambda *a, **k: pytest.fail("discovery was started")
    )
    for changes, peft_config, message in (
        ({"ica_component_ids": [12]}, None, "networks are 0-9"),
        ({}, LoraConfig(use_dora=True), "DoRA"),
    ):
        with pytest.raises(FNSFTError, match=message):
            FNSFTTrainer(
                model=str(model_dir),
                args=sft_config(tmp_path),
                train_dataset=Dataset.from_list(rows),
                peft_config=peft_config,
                network_config=FunctionalNetworkConfig(**changes),
            )


@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_a_quantised_model_is_trained_without_touching_its_weights(rows, tokenizer, tmp_path, method):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=120, **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = FNSFTTrainer(
        model=str(tmp_path / "base"),
        args=sft_config(tmp_path / "out", eval_strategy="steps", eval_steps=2),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(**DISCOVERY),
    )
    assert trainer.model.is_loaded_in_4bit
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if method == "neuron_delta" else torch.bfloat16}
    down = trainer.model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    before = dequantize_4bit(down.base_layer.weight.data.clone(), down.base_layer.weight.quant_state)
    trainer.train()
    trainer.model.train()
    # After discovery and evaluation, which are inference, gradients still pass through the quantised layers.
    inputs = torch.ones(1, 3, 128, requires_grad=True)
    down.base_layer(inputs).sum().backward()
    assert inputs.grad.any()
    weight = down.base_layer.weight
    assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), before)
    if method == "lora":
        frozen = (~trainer.trainable_neurons).indices(1)
        assert not down.lora_A["default"].weight[:, frozen].any()
        assert down.lora_B["default"].weight.any()
    else:
        assert down.neuron_delta_weight["default"].values.any()


def test_attention_targets_that_the_user_names_train_as_usual(templates, rows, tokenizer, tmp_path):
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = tiny_model("llama")
    before = state(model)
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], model=model, peft_config=peft_config)
    assert peft_config.target_modules == {"q_proj", "down_proj"}
    trainer.train()
    changed = changed_entries(before, state(trainer.model.merge_and_unload()))
    assert any("q_proj" in name for name in changed)
    assert any("down_proj" in name for name in changed)
    assert not any("gate_proj" in name for name in changed)


@pytest.mark.slow
def test_optimizer_state_is_proportional_to_the_selection(templates, rows, tokenizer, tmp_path):
    sizes = []
    for fraction in (0.1, 0.4):
        trainer = make(tmp_path, rows, tokenizer, templates["llama"], ica_fraction=fraction)
        trainer.train()
        sizes.append(
            sum(v.numel() for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        )
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)


def test_retention_is_logged_at_each_evaluation(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], args={"eval_strategy": "steps", "eval_steps": 2})
    trainer.add_callback(RetentionCallback(trainer, [row["completion"] for row in rows], max_tokens=60))
    trainer.train()
    history = trainer.state.log_history
    (base,) = [entry for entry in history if "retention/base" in entry]
    rises = [(entry["step"], entry["retention/rise"]) for entry in history if "retention/rise" in entry]
    assert [step for step, _ in rises] == [0, 2, 4]
    assert base["retention/tokens"] == 60
    assert [rise != 0 for _, rise in rises] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_config": LoraConfig(use_dora=True)}, "DoRA rescales"),
        ({"peft_config": LoraConfig(lora_bias=True)}, "lora_bias"),
        ({"peft_config": LoraConfig(bias="all")}, "bias"),
        ({"peft_config": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights"),
        ({"peft_config": LoraConfig(init_lora_weights=False)}, "init_lora_weights"),
        ({"peft_config": LoraConfig(target_modules=["q_proj"])}, "no MLP module"),
        ({"peft_config": LoraConfig(modules_to_save=["mlp"])}, "modules_to_save"),
        ({"peft_config": LoraConfig(target_modules=["q_proj"]), "train_method": "full"}, "drop peft_config"),
        ({"peft_config": LoraConfig(), "train_method": "neuron_delta"}, "lora needs target_modules"),
        (
            {"peft_config": LoraConfig(target_modules="all-linear"), "train_method": "neuron_delta"},
            "lora needs target_modules",
        ),
        ({"train_method": "lora"}, "needs a LoraConfig"),
        ({"train_method": "full", "args": {"optim": "galore_adamw_layerwise"}}, "during the backward pass"),
        ({"ica_component_ids": [9]}, "it has the networks 0-2"),
    ],
)
def test_bad_combinations_are_errors_before_the_first_step(templates, rows, tokenizer, tmp_path, arguments, message):
    with pytest.raises(FNSFTError, match=message) as error:
        make(tmp_path / "out", rows, tokenizer, templates["llama"], **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_shards_a_run_is_asked_of_the_trainer_too(templates, rows, tokenizer, tmp_path, monkeypatch):
    """Others may have made the state of accelerate, of which the arguments know nothing."""
    monkeypatch.setattr(Engine, "of_trainer", lambda trainer: Engine("DeepSpeed ZeRO-2"))
    with pytest.raises(FNSFTError, match="train_method=full does not run under DeepSpeed ZeRO-2"):
        make(tmp_path, rows, tokenizer, templates["llama"], train_method="full")


def test_no_discovery_on_weights_that_zero3_has_sharded(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fnsft_trl.training.preparation.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(FNSFTError, match="run fnsft discover first"):
        make(tmp_path, rows, tokenizer, **DISCOVERY)


def test_an_adapter_that_already_moved_frozen_neurons_is_refused(templates, rows, tokenizer, tmp_path):
    config = LoraConfig(r=2, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(FNSFTError, match="already changes neurons"):
        make(tmp_path, rows, tokenizer, templates["llama"], model=wrapped)


def test_no_training_rows_is_an_error(rows, tokenizer, tmp_path):
    with pytest.raises(FNSFTError, match="train_dataset has no rows"):
        FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path),
            train_dataset=Dataset.from_list(rows).select([]),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(**DISCOVERY),
        )


def test_the_tokenizer_is_found_by_the_models_name(model_dir, rows, templates, tmp_path):
    trainer = FNSFTTrainer(
        model=str(model_dir),
        args=sft_config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        network_config=FunctionalNetworkConfig(),
        network_template=templates["llama"],
    )
    assert trainer.processing_class.get_vocab() == AutoTokenizer.from_pretrained(model_dir).get_vocab()


def test_lora_on_attention_trains_beside_neuron_deltas(templates, rows, tokenizer, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], peft_config=lora, train_method="neuron_delta")
    base = tiny_model("llama")
    before = state(base)
    trainer.train()
    trainer.save_model()
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(merged), before, state(merged))
    assert changed == trainer.neuron_mask
    assert others == ["lm_head.weight", *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3))]
    assert lora.modules_to_save == ["lm_head"]  # the caller's configuration is left alone
