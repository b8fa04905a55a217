"""Every variant of LoRA that PEFT offers: held to a mask exactly, or refused with the reason."""

import copy
import typing
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, VOCABULARY, random_mask, sft_config, state, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, NeuronMask, constrain_lora, find_neuron_sites
from fnsft_trl.constraints import check_lora_config, set_lora_targets
from fnsft_trl.constraints.lora_config import EXACT_INITS, HELD_LORA_FIELDS, REFUSED_INITS, REFUSED_LORA_FIELDS
from fnsft_trl.export import changed_neurons


# name -> the settings. Held exactly: trained, merged and compared below.
EXACT = {
    "plain": {},
    "`use_rslora`": {"use_rslora": True},
    "`lora_dropout`": {"lora_dropout": 0.3},
    "`rank_pattern`, `alpha_pattern`": {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"down_proj": 32}},
    "`target_modules`": {"target_modules": ["down_proj", "q_proj"]},
    "`target_modules='all-linear'`": {"target_modules": "all-linear"},
    "`target_parameters`": {
        "target_modules": [],
        "target_parameters": ["mlp.up_proj.weight", "mlp.down_proj.weight"],
    },
    "`exclude_modules`": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "`layers_to_transform`": {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "`trainable_token_indices`": {"trainable_token_indices": {"embed_tokens": [4, 5]}},
    "`modules_to_save` without an MLP": {"modules_to_save": ["lm_head"]},
    "`init_lora_weights='gaussian'`": {"init_lora_weights": "gaussian"},
    "`init_lora_weights='eva'`": {"init_lora_weights": "eva"},
    "`init_lora_weights='orthogonal'`": {"init_lora_weights": "orthogonal"},
    "`init_lora_weights='mica'`": {"init_lora_weights": "mica"},
}
DORA = "`use_dora` on modules of which neurons are outputs (up and gate; down at `mlp_output`)"
_FIELD_SETTINGS = {
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], nblocks=2),
    "velora_config": VeloraConfig(),
    "kasa_config": KasaConfig(),
    "monteclora_config": MontecloraConfig(),
    "arrow_config": ArrowConfig(),
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [(0, 2), (1, 3)],
    "megatron_config": {"tensor_model_parallel_size": 2},
}
_INIT_SETTINGS = {"loftq": {"loftq_config": {"loftq_bits": 4}}}
# name -> (the settings, the reason).
REFUSED = {
    f"`{name}`": ({name: _FIELD_SETTINGS.get(name, True)}, reason) for name, reason in REFUSED_LORA_FIELDS.items()
}
REFUSED |= {
    f"`init_lora_weights={init!r}`": ({"init_lora_weights": init, **_INIT_SETTINGS.get(init, {})}, reason)
    for init, reason in {**REFUSED_INITS, "pissa_niter_4": REFUSED_INITS["pissa"]}.items()
}
REFUSED["`bias='all'`, `'lora_only'`"] = ({"bias": "all"}, "it trains biases of frozen neurons")
REFUSED["`modules_to_save` with an MLP"] = ({"modules_to_save": ["up_proj"]}, "its neurons would all train")


def table() -> str:
    rows = ["| LoRA variant | outcome |", "|---|---|"]
    rows += [f"| {name} | exact |" for name in (*EXACT, DORA)]
    rows += [f"| {name} | refused: {reason} |" for name, (_, reason) in REFUSED.items()]
    rows += ["| `use_dora` on a module of which neurons are inputs | refused: it rescales all of them |"]
    return "\n".join(rows)


def test_the_table_in_the_docs_is_this_one():
    assert table() in (ROOT / "docs" / "combinations.md").read_text()


def test_every_field_of_lora_config_is_sorted():
    names = {field.name for field in fields(LoraConfig)}
    assert names - HELD_LORA_FIELDS == set(REFUSED_LORA_FIELDS)
    assert names >= HELD_LORA_FIELDS


def test_every_initialisation_of_lora_config_is_sorted():
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    offered = {value for part in typing.get_args(hint) for value in typing.get_args(part) or (True, False)}
    for value in offered:
        refused = any(value == init or str(value).startswith(f"{init}_") for init in REFUSED_INITS)
        assert refused != (value in EXACT_INITS), value
    shown = {settings.get("init_lora_weights", True) for settings in EXACT.values()}
    assert shown == set(EXACT_INITS)


def test_what_is_not_sorted_is_refused(monkeypatch):
    monkeypatch.delitem(REFUSED_LORA_FIELDS, "use_qalora")  # as a field of a newer PEFT would be
    for settings in ({"use_qalora": True}, {"init_lora_weights": "newest"}):
        with pytest.raises(FNSFTError, match="does not know it"):
            check_lora_config(LoraConfig(**settings), tiny_model("llama"), "mlp_intermediate")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    settings, reason = REFUSED[name]
    with pytest.raises(FNSFTError) as error:
        check_lora_config(LoraConfig(task_type="CAUSAL_LM", **settings), tiny_model("llama"), "mlp_intermediate")
    message = str(error.value)
    assert next(iter(settings)) in message
    assert reason.removeprefix("it ") in message
    assert "\n" not in message


def batch(seed=2):
    return torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(seed))


def train(model, steps=3, held=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3)
    if held is not None:
        held.attach(optimizer)
    for step in range(steps):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(base, mask, settings, *, hold=True):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    set_lora_targets(config, base, mask)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    if config.init_lora_weights == "eva":
        batches = [{"input_ids": batch(i), "attention_mask": torch.ones(4, 9, dtype=torch.long)} for i in range(8)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    if hold:
        constrain_lora(model, mask)
    return model


def moved(model, mask, before) -> NeuronMask:
    """The neurons that differ after the merge."""
    fresh = tiny_model("llama")
    merged = {name.replace("token_adapter.base_layer.", ""): v for name, v in state(model.merge_and_unload()).items()}
    changed, _ = changed_neurons(find_neuron_sites(fresh, kind=mask.site), before, merged)
    return changed


def expected(mask, settings) -> NeuronMask:
    layers = settings.get("layers_to_transform", mask.layers)
    return NeuronMask({i: m if i in layers else torch.zeros_like(m) for i, m in mask.layers.items()}, mask.site)


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
@pytest.mark.parametrize("name", EXACT)
def test_held_exactly_and_reloaded(name, site, tmp_path):
    mask = random_mask(tiny_model("llama"), site)
    before = state(tiny_model("llama"))
    model = adapted(tiny_model("llama"), mask, EXACT[name])
    train(model)
    model.save_pretrained(tmp_path)
    assert moved(model, mask, before) == expected(mask, EXACT[name])
    reloaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert moved(reloaded, mask, before) == expected(mask, EXACT[name])


@pytest.mark.parametrize("name", EXACT)
def test_without_the_masks_the_same_check_fails(name):
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    before = state(tiny_model("llama"))
    model = adapted(tiny_model("llama"), mask, EXACT[name], hold=False)
    train(model)
    assert (moved(model, mask, before) & ~expected(mask, EXACT[name])).count


DORA_TARGETS = {"mlp_intermediate": ["gate_proj", "up_proj", "q_proj"], "mlp_output": ["down_proj"]}


@pytest.mark.parametrize("site", DORA_TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_is_held_where_neurons_are_outputs(family, site, tmp_path):
    targets = DORA_TARGETS[site]
    if family == "gpt2":
        targets = ["c_fc"] if site == "mlp_intermediate" else [r"mlp.c_proj"]
    base = tiny_model(family)
    mask, before, sites = random_mask(base, site), state(base), find_neuron_sites(tiny_model(family), kind=site)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, use_dora=True))
    held = constrain_lora(model, mask)
    train(model, held=held)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    for trained in (model, reloaded):
        merged = state(trained.merge_and_unload())
        assert changed_neurons(sites, before, merged)[0] == mask

    loose = get_peft_model(
        tiny_model(family), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, use_dora=True)
    )
    constrain_lora(loose, mask)
    train(loose)  # weight decay moves the magnitudes of frozen rows
    assert (changed_neurons(sites, before, state(loose.merge_and_unload()))[0] & ~mask).count
    with pytest.raises(FNSFTError, match="already changes neurons"):
        constrain_lora(PeftModel.from_pretrained(tiny_model(family), tmp_path), ~mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_is_held_on_a_base_in_half_precision(dtype, tmp_path):
    """PEFT starts from norms in the precision of the base, and merges with more precise ones."""
    base = tiny_model("llama").to(dtype)
    mask, before, sites = random_mask(base, "mlp_intermediate"), state(base), find_neuron_sites(tiny_model("llama"))
    targets = DORA_TARGETS["mlp_intermediate"]
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, use_dora=True))
    train(model, held=constrain_lora(model, mask))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model("llama").to(dtype), tmp_path)
    constrain_lora(reloaded, mask)
    for trained in (model, reloaded):
        assert not (changed_neurons(sites, before, state(trained.merge_and_unload()))[0] & ~mask).count


def test_a_copy_of_held_dora_does_not_train():
    """The hooks on the gradients of its magnitudes are those of the original."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["up_proj"], use_dora=True)
    model = get_peft_model(tiny_model("llama"), config)
    constrain_lora(model, random_mask(tiny_model("llama"), "mlp_intermediate"))
    twin = copy.deepcopy(model)
    train(model)
    with pytest.raises(FNSFTError, match="in a copy of the model"):
        train(twin)


@pytest.mark.parametrize("targets", [None, "all-linear", ["up_proj", "down_proj"]])
def test_dora_where_neurons_are_inputs_is_refused(targets):
    config = LoraConfig(use_dora=True, target_modules=targets)
    with pytest.raises(FNSFTError, match=r"DoRA rescales every row of model\.layers\.0\.mlp\.down_proj"):
        check_lora_config(config, tiny_model("llama"), "mlp_intermediate")


def test_several_adapters_are_each_held_to_a_mask_of_their_own():
    masks = {
        name: random_mask(tiny_model("llama"), "mlp_intermediate", seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    before = state(tiny_model("llama"))
    base = tiny_model("llama")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["up_proj", "gate_proj", "down_proj"])
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["up_proj", "down_proj"]))
    for name, mask in masks.items():
        constrain_lora(model, mask, adapter_name=name)
    model.set_adapter("one")
    train(model)
    model.set_adapter("two")
    train(model)
    model.base_model.set_adapter(["one", "two"])
    train(model)
    sites = find_neuron_sites(tiny_model("llama"))
    for names in (["one"], ["two"], ["one", "two"]):
        model.base_model.merge_adapter(names)
        merged = {key.replace(".base_layer", ""): v for key, v in state(model.get_base_model()).items()}
        changed, _ = changed_neurons(sites, before, {key: merged[key] for key in before})
        union = masks[names[0]] | masks[names[-1]]
        assert changed == union
        model.base_model.unmerge_adapter()
        for key, value in model.get_base_model().state_dict().items():  # addition and subtraction round
            if key.replace(".base_layer", "") in before and ".lora_" not in key:
                value.copy_(before[key.replace(".base_layer", "")])


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantised") / "base"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", QUANTISED)
def test_lora_on_a_quantised_base_is_exact_and_does_not_merge(base_dir, name):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**QUANTISED[name])
    base = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config, dtype=torch.float32)
    mask = random_mask(base, "mlp_intermediate")
    base.train()
    model = adapted(base, mask, {})
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len(packed) == 2 * 7
    train(model)
    for name, value in packed.items():
        assert torch.equal(model.get_parameter(name), value)
    for site in find_neuron_sites(model):
        frozen, trained = (~mask).indices(site.layer), mask.indices(site.layer)
        for part in site.layout.slices:
            change = model.get_submodule(part.module_name).get_delta_weight("default")
            assert not change.index_select(part.dim, frozen).any()
            assert change.index_select(part.dim, trained).flatten().any()
    with pytest.raises(FNSFTError, match="cannot be merged into"):
        model.merge_and_unload()


def test_4bit_weights_that_are_packed_for_inference_are_refused(base_dir, rows, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config, dtype=torch.float32)
    with torch.no_grad():
        model(batch())
    quant_state = model.model.layers[0].mlp.up_proj.weight.quant_state
    if not vars(quant_state).get("packing_format_for_cpu"):
        pytest.skip("bitsandbytes does not pack for this processor")
    with pytest.raises(FNSFTError, match="packed for inference on a CPU"):
        FNSFTTrainer(
            model=model,
            args=sft_config(tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(),
        )
