"""Neuron deltas on the experts of a layer: both forms, all that PEFT's methods do, masks and discovery beside them."""

import copy
from itertools import pairwise

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import changed_entries, logits, random_mask, state, zeroed
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fnsft_trl import (
    FNSFTError,
    NeuronMask,
    NeuronTunerConfig,
    bake_lesion,
    constrain_lora,
    find_neuron_sites,
    lesion,
    unbake,
)
from fnsft_trl.constraints import set_lora_targets
from fnsft_trl.data.sequences import TokenSequence
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.sites import SITES
from fnsft_trl.tuner import ExpertDeltaLayer, NeuronDeltaLayer
from fnsft_trl.tuner.held import HeldWeights


NAMED = {str(architecture): architecture for architecture in ARCHITECTURES}
MIXED_NAMES = [str(architecture) for architecture in ARCHITECTURES if not architecture.dense]


@pytest.fixture(params=MIXED_NAMES)
def name(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def additive(monkeypatch):
    """Switches all layers to the additive form."""
    return lambda: monkeypatch.setattr(HeldWeights, "can_hold", lambda *args: False)


def wrap(name, site="mlp_intermediate", mask=None, **config):
    base = NAMED[name].model()
    mask = random_mask(base, site) if mask is None else mask
    return get_peft_model(
        base, NeuronTunerConfig(neurons=mask.to_ranges(), site=site, task_type="CAUSAL_LM", **config)
    )


def randomize(model, seed=0):
    """Deltas as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def base_values(model):
    """The base model's parameters as they lie in memory, under their names without adapters."""
    values = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters() if "neuron_delta" not in n}
    return {name.replace(".base_layer", ""): value for name, value in values.items()}


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("site", SITES)
def test_untrained_deltas_change_nothing(name, site, ids):
    """To rounding: architectures multiply the experts in other orders than one after the other."""
    found, expected = logits(wrap(name, site).eval(), ids), logits(NAMED[name].model(), ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_what_trains_is_one_row_for_each_position_of_the_selected_neurons(name, site):
    model = wrap(name, site)
    mask = random_mask(NAMED[name].model(), site)
    expected = 0
    for s in find_neuron_sites(NAMED[name].model(), kind=site):
        for part in s.layout.slices:
            expected += part.select(part.tensor(NAMED[name].model()), part.indices(mask.indices(s.layer))).numel()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert all(not p.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("site", SITES)
def test_gradients_of_the_deltas_are_those_of_the_weights_slices(name, site, ids, additive):
    model = randomize(wrap(name, site)).train()
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    mask = random_mask(NAMED[name].model(), site)
    held = gradients(model, ids)
    additive()
    added = gradients(model, ids)
    count = 0
    for s in find_neuron_sites(merged, kind=site):
        for part in s.layout.slices:
            expected = part.select(part.tensor(merged).grad, part.indices(mask.indices(s.layer)))
            key = f"base_model.model.{part.module_name}.neuron_delta_{part.parameter}.default.values"
            for found in (held[key], added[key]):
                torch.testing.assert_close(found.view_as(expected), expected, atol=1e-5, rtol=1e-4)
            count += 1
    assert count == len(held)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("site", SITES)
def test_both_forms_and_the_merged_model_compute_the_same(name, site, implementation, ids, additive):
    model = randomize(wrap(name, site)).train()
    model.get_base_model().set_experts_implementation(implementation)
    held = logits(model, ids)
    with_gradients = model(ids).logits.detach()
    assert not torch.allclose(held, logits(NAMED[name].model(), ids), atol=1e-3)
    additive()
    added = logits(model, ids)
    merged = model.merge_and_unload()
    for found in (with_gradients, added, logits(merged, ids)):
        torch.testing.assert_close(found, held, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_the_base_values_come_back_bit_for_bit(name, site, ids):
    original = {n: p.detach().clone() for n, p in NAMED[name].model().named_parameters()}
    model = randomize(wrap(name, site)).eval()
    plain = logits(NAMED[name].model(), ids)

    def run():
        for training in (True, False):
            gradients(model.train(training), ids)
            logits(model, ids)
            assert changed_entries(original, base_values(model)) == {}

    run()
    part = next(p for s in find_neuron_sites(model, kind=site) if s.experts for p in s.layout.slices)
    assert torch.equal(part.tensor(model), original[part.full_name.removeprefix("base_model.model.")])
    with model.disable_adapter():
        assert changed_entries(original, base_values(model)) == {}
        assert torch.equal(logits(model, ids), plain)
    run()
    model.merge_adapter(safe_merge=True)
    assert changed_entries(original, base_values(model))
    changed, others = changed_neurons(find_neuron_sites(NAMED[name].model(), kind=site), original, base_values(model))
    assert others == []
    assert changed == random_mask(NAMED[name].model(), site)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    model.merge_adapter()
    model.unmerge_adapter()
    assert changed_entries(original, base_values(model)) == {}
    run()
    assert changed_entries(original, {n: p.detach() for n, p in model.unload().named_parameters()}) == {}


def test_safe_merge_refuses_broken_deltas_and_leaves_the_weights(ids):
    model = wrap("MixtralForCausalLM")
    before = base_values(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert changed_entries(before, base_values(model)) == {}


@pytest.mark.parametrize("site", SITES)
def test_save_and_load(name, site, ids, tmp_path):
    NAMED[name].model().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        NeuronTunerConfig(
            neurons=random_mask(NAMED[name].model(), site).to_ranges(), site=site, task_type="CAUSAL_LM"
        ),
    )
    randomize(model).eval().save_pretrained(tmp_path / "adapter")
    expected = logits(model, ids)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), ids), expected)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(alone, ids), expected)


def two_adapters(name):
    """A model with adapters `default` and `other`, and their masks, of which some neurons are in both."""
    masks = [random_mask(NAMED[name].model(), "mlp_intermediate", share=0.3, seed=seed) for seed in (0, 1)]
    model = wrap(name, mask=masks[0])
    model.add_adapter("other", NeuronTunerConfig(neurons=masks[1].to_ranges(), task_type="CAUSAL_LM"))
    assert (masks[0] & masks[1]).count
    return randomize(model).eval(), masks


def test_several_adapters_alone_together_and_as_a_weighted_sum(name, ids):
    model, masks = two_adapters(name)
    original = state(NAMED[name].model())
    sites = find_neuron_sites(NAMED[name].model())
    apart = {}
    for active in ("default", "other"):
        model.set_adapter(active)
        apart[active] = logits(model, ids)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    held = gradients(model, ids)
    assert {key.split(".")[-2] for key in held} == {"default", "other"}
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, ids), both, atol=1e-5, rtol=1e-4)
    merged = state(copy.deepcopy(model).merge_and_unload())
    changed, others = changed_neurons(sites, original, merged)
    assert (changed, others) == (masks[0] | masks[1], [])
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), apart["default"])
    model.delete_adapter("sum")
    model.delete_adapter("default")
    assert torch.equal(logits(model, ids), apart["other"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, ids, reentrant):
    model = randomize(wrap(name))
    expected = gradients(model, ids)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, ids)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-5)


def test_two_forward_passes_before_one_backward_pass(ids):
    """As in losses on pairs; the weights are written between the two."""
    model = randomize(wrap("MixtralForCausalLM")).train()
    first = gradients(model, ids[:1])
    second = gradients(model, ids[1:])
    model.zero_grad()
    losses = [model(input_ids=row, labels=row).loss for row in (ids[:1], ids[1:])]
    with torch.no_grad(), model.disable_adapter():
        model(ids)
    sum(losses).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, first[key] + second[key], atol=1e-6, rtol=1e-4)


def test_experts_without_tokens_give_gradients_of_zero(ids):
    """And not none at all, for which DistributedDataParallel would wait."""
    base = NAMED["MixtralForCausalLM"].model()
    mask = NeuronMask.from_ranges({"0": "0-3"}, {0: 24, 1: 24}, "mlp_intermediate")
    model = get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges()))
    with torch.no_grad():
        base.model.layers[0].mlp.gate.weight[0] = 0
        base.model.layers[0].mlp.gate.weight[1:] = 0
    block = base.model.layers[0].mlp
    block.gate.forward = lambda x: _route_past_expert_0(x, block)
    found = gradients(model, ids)
    assert len(found) == 2
    assert not any(gradient.any() for gradient in found.values())


def _route_past_expert_0(x, block):
    tokens = x.reshape(-1, x.shape[-1]).shape[0]
    chosen = torch.tensor([[1, 2]]).expand(tokens, 2)
    weights = torch.full((tokens, 2), 0.5)
    return torch.zeros(tokens, 3), weights, chosen


def test_a_bfloat16_base_keeps_float32_deltas(name, ids):
    base = NAMED[name].model().to(torch.bfloat16)
    before = {key: value.detach().clone() for key, value in base.named_parameters()}
    model = get_peft_model(base, NeuronTunerConfig(neurons=random_mask(base, "mlp_intermediate").to_ranges()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits(model, ids).dtype == torch.bfloat16
    assert changed_entries(before, base_values(model)) == {}


@pytest.mark.parametrize("site", SITES)
def test_masks_reach_through_the_deltas(name, site, ids):
    model = randomize(wrap(name)).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    mask = random_mask(merged, site, seed=5)
    expected = logits(zeroed(merged, mask), ids)
    with lesion(model, mask) as handle:
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids).logits.detach(), expected, atol=1e-5, rtol=1e-4)
        handle.disable()
        torch.testing.assert_close(logits(model, ids), logits(merged, ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, ids), logits(merged, ids), atol=1e-5, rtol=1e-4)


def test_a_lesioned_neuron_has_no_gradient(name, ids):
    model = randomize(wrap(name))
    mask = random_mask(NAMED[name].model(), "mlp_intermediate")
    with lesion(model, mask):
        assert not any(gradient.any() for gradient in gradients(model, ids).values())
    assert all(gradient.any() for gradient in gradients(model, ids).values())


def test_activations_are_read_through_the_deltas(name):
    model = randomize(wrap(name)).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    rows = []
    for read in (model, merged):
        sites = find_neuron_sites(read)
        reader = ActivationReader(read, sites, batch_size=2, max_length=8, skip_tokens=0, special_ids=[])
        (block,) = [b.rows.clone() for b in reader.read([[TokenSequence([5, 6, 7, 8], 0)]], max_tokens=9)]
        rows.append(block)
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_models_compute_the_same(ids):
    model = randomize(wrap("MixtralForCausalLM")).train()
    expected = gradients(model, ids), logits(model, ids)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits.detach(), expected[1], atol=1e-4, rtol=1e-4)
    found = gradients(compiled, ids)
    for (key, gradient), other in zip(expected[0].items(), found.values(), strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-3, msg=key)
    torch.compiler.reset()


def test_modules_that_hold_the_experts_are_not_saved_as_a_whole():
    with pytest.raises(FNSFTError, match="its neurons would all train"):
        wrap("MixtralForCausalLM", modules_to_save=["experts"])


def test_lora_beside_the_deltas_leaves_the_shared_expert_alone():
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model = wrap("Qwen2MoeForCausalLM", lora=lora)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    for name in ("down_proj", "up_proj"):
        with pytest.raises(FNSFTError, match="a part of an MLP"):
            wrap("Qwen2MoeForCausalLM", lora={**lora, "target_modules": ["q_proj", name]})


def test_zero3_is_refused(monkeypatch):
    monkeypatch.setattr("fnsft_trl.tuner.experts.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(FNSFTError, match=r"experts \(model\.layers\.0\.mlp\.experts\) do not run under ZeRO-3"):
        wrap("MixtralForCausalLM")


def test_weights_that_are_not_there_are_an_error(ids):
    """Offloaded, or sharded on their own: the loop over the experts reads them without calling their module."""
    model = wrap("MixtralForCausalLM").eval()
    model.get_base_model().model.layers[1].mlp.experts.base_layer.to("meta")
    with pytest.raises(FNSFTError, match="sharded on their own, or offloaded"):
        logits(model, ids)


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_experts_beside_quantised_layers(kind, ids, tmp_path):
    """transformers leaves fused experts as they are; their deltas merge, those of a quantised shared expert do not."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "head_dim": 32}
    config = type(NAMED["Qwen2MoeForCausalLM"].model().config)(**{**NAMED["Qwen2MoeForCausalLM"].config, **wide})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load = {"quantization_config": BitsAndBytesConfig(**QUANTISED[kind]), "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **load).train()
    before = {key: value.detach().clone() for key, value in base.named_parameters()}
    plain = logits(base, ids)
    routed = {site.layer: site.experts.width for site in find_neuron_sites(base)}
    mask = random_mask(base, "mlp_intermediate")
    model = randomize(get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges(), task_type="CAUSAL_LM")))
    assert all(gradient.any() for gradient in gradients(model, ids).values())
    assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
    with pytest.raises(FNSFTError, match="cannot be merged into a Linear"):
        model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    assert changed_entries(before, base_values(model)) == {}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **load).train()
    for layer, members in mask.layers.items():
        members[routed[layer] :] = False
    model = randomize(get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges(), task_type="CAUSAL_LM")))
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)  # other products

    base = AutoModelForCausalLM.from_pretrained(tmp_path, **load).train()
    with pytest.raises(FNSFTError, match="is quantised, so PEFT cannot adapt it as it does the experts"):
        set_lora_targets(LoraConfig(r=2), base, mask)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    constrain_lora(model, mask)
    assert sum(bool(gradient.any()) for gradient in gradients(model, ids).values()) == 4  # B; A follows in later steps


def test_half_precision_deltas_are_brought_back_to_float32():
    """A trainer casts all adapters of a model with quantised layers."""
    model = wrap("MixtralForCausalLM")
    for module in model.modules():
        if isinstance(module, ExpertDeltaLayer):
            for delta in module._deltas(["default"])["default"]:
                delta.values.data = delta.values.data.bfloat16()
            module.float_deltas()
    assert {p.dtype for name, p in model.named_parameters() if "neuron_delta" in name} == {torch.float32}


def test_layers_get_deltas_only_where_they_have_a_selected_neuron():
    """Routed experts and the shared one are of one site."""
    base = NAMED["Qwen2MoeForCausalLM"].model()
    model = get_peft_model(base, NeuronTunerConfig(neurons={"0": "3", "1": "30"}))
    layers = [n for n, module in model.named_modules() if isinstance(module, NeuronDeltaLayer)]
    experts = [n for n, module in model.named_modules() if isinstance(module, ExpertDeltaLayer)]
    assert [name.partition("layers.")[2] for name in experts] == ["0.mlp.experts"]
    assert len(layers) == 1 + 3
    assert all(p.numel() for p in model.parameters())


@pytest.mark.parametrize("site", SITES)
def test_baked_lesions_of_experts(name, site, ids):
    model = NAMED[name].model()
    mask = random_mask(model, site)
    before, expected = state(model), logits(zeroed(model, mask), ids)
    kept = bake_lesion(model, mask)
    assert torch.equal(logits(model, ids), expected)
    unbake(model, kept)
    assert changed_entries(before, state(model)) == {}


def test_steps_of_an_optimizer_are_seen(ids):
    model = wrap("GptOssForCausalLM").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(later < earlier for earlier, later in pairwise(losses))
