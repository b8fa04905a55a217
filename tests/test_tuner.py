import copy

import pytest
import torch
from helpers import VOCABULARY, changed_entries, state, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fnsft_trl import FNSFTError, NeuronTunerConfig, find_neuron_sites
from fnsft_trl.neurons import SITES


NEURONS = {"0": "0-4,9", "2": "3"}


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def wrap(family, site="mlp_intermediate", neurons=NEURONS):
    return get_peft_model(tiny_model(family), NeuronTunerConfig(neurons=neurons, site=site, task_type="CAUSAL_LM"))


def fit(model, ids, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("site", SITES)
def test_untrained_deltas_change_nothing(family, site, ids):
    assert torch.equal(logits(wrap(family, site).eval(), ids), logits(tiny_model(family), ids))


@pytest.mark.parametrize("site", SITES)
def test_trained_parameters_are_the_selected_neurons_and_no_more(family, site):
    model = wrap(family, site)
    expected = 0
    for s in find_neuron_sites(tiny_model(family), kind=site):
        count = {0: 6, 2: 1}.get(s.layer, 0)
        for part in s.layout.slices:
            parameter = getattr(tiny_model(family).get_submodule(part.module_name), part.parameter)
            expected += count * len(part.offsets) * parameter.numel() // parameter.shape[part.dim]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("site", SITES)
def test_merge_equals_forward_and_unmerge_restores_every_bit(family, site, ids):
    model = fit(wrap(family, site), ids)
    before = state(model)
    adapted = logits(model, ids)
    assert not torch.allclose(adapted, logits(tiny_model(family), ids), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, ids), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert changed_entries(before, state(model)) == {}
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, ids), adapted, atol=1e-5)
    assert changed_entries(state(tiny_model(family)), state(merged))


def test_disabled_adapter_is_the_base_model_even_when_merged(family, ids):
    model = fit(wrap(family), ids)
    base = logits(tiny_model(family), ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("site", SITES)
def test_save_and_load(family, site, ids, tmp_path):
    model = fit(wrap(family, site), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.peft_config["default"].neurons == NEURONS
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_transformers_loads_the_adapter_by_itself(ids, tmp_path):
    """AutoModel loads a directory with an adapter; it asks PEFT for the method's name."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    fit(model, ids).save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_two_adapters_of_other_neurons_on_one_model(ids):
    model = wrap("llama", neurons={"0": "0-4"})
    model.add_adapter("other", NeuronTunerConfig(neurons={"1": "7"}, task_type="CAUSAL_LM"))
    fit(model, ids)
    first = logits(model, ids)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    fit(model, ids)
    assert not torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_a_bfloat16_base_keeps_float32_deltas(ids):
    base = tiny_model("llama").to(torch.bfloat16)
    before = state(base)
    model = fit(get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM")), ids)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, ids).dtype == torch.bfloat16
    after = {name.replace(".base_layer", ""): value for name, value in state(model.get_base_model()).items()}
    assert changed_entries(before, {name: after[name] for name in before}) == {}


def test_a_quantised_base_is_not_touched_and_not_merged(ids):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(mlp_bias=True, vocab_size=VOCABULARY, **shape)).eval()
    for block in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(block.mlp, name)
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
            packed.bias = torch.nn.Parameter(layer.bias.data.clone())
            setattr(block.mlp, name, packed.to("cpu"))
    # In inference the 4-bit kernel repacks the weights and rounds differently: compare in training mode throughout.
    plain = logits(base.train(), ids)
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    fit(model, ids).train()
    assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    with pytest.raises(FNSFTError, match="cannot be merged into a Linear4bit"):
        model.merge_adapter()


def test_safe_merge_refuses_broken_deltas_and_leaves_the_weights(ids):
    model = wrap("llama")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    before = state(model.get_base_model())
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    after = state(model.get_base_model())
    base = {name: value for name, value in before.items() if "neuron_delta" not in name}
    assert changed_entries(base, {name: after[name] for name in base}) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"neurons": {}}, "selects no neuron"),
        ({"neurons": {"9": "0"}}, "layers are 0-2"),
        ({"neurons": {"0": "40"}}, "outside 0-39"),
        ({"neurons": NEURONS, "modules_to_save": ["mlp"]}, "its neurons would all train"),
        ({"neurons": NEURONS, "modules_to_save": ["down_proj"]}, "its neurons would all train"),
    ],
)
def test_configs_that_cannot_be_carried_out(config, message):
    with pytest.raises(FNSFTError, match=message):
        get_peft_model(tiny_model("llama"), NeuronTunerConfig(**config))


def test_added_tokens_and_the_head_may_train_beside_the_neurons(ids, tmp_path):
    config = NeuronTunerConfig(
        neurons=NEURONS,
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [5, 6]},
        task_type="CAUSAL_LM",
    )
    model = fit(get_peft_model(tiny_model("llama"), config), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_deepcopy_is_independent(ids):
    model = wrap("llama")
    twin = copy.deepcopy(model)
    fit(model, ids)
    assert torch.equal(logits(twin.eval(), ids), logits(tiny_model("llama"), ids))


def test_lora_on_the_same_model_type_is_unaffected(ids):
    """The tables of PEFT keep their own entries."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
