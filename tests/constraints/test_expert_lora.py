"""LoRA on the weights of experts, held to neurons: PEFT's factors of all experts in one, used without being called."""

import copy
import subprocess
import sys

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import logits, medium_experts, random_mask, state
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file, save_file

from fnsft_trl import FNSFTError, FrozenNeuronGuard, constrain_lora, find_neuron_sites
from fnsft_trl.constraints import factor_slices, set_lora_targets
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.layout import mask_positions
from fnsft_trl.neurons.sites import SITES
from fnsft_trl.training.guard import FrozenNeuronMoved


NAMED = {str(architecture): architecture for architecture in ARCHITECTURES}
MIXED_NAMES = [str(architecture) for architecture in ARCHITECTURES if not architecture.dense]
RELOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root, differences = Path(sys.argv[1]), {}
for name, logits in load_file(root / "expected.safetensors").items():
    if name == "ids":
        continue
    base = AutoModelForCausalLM.from_pretrained(root / name / "base")
    model = PeftModel.from_pretrained(base, root / name / "adapter").eval()
    ids = load_file(root / "expected.safetensors")["ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits), name
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    torch.save(merged.state_dict(), root / name / "merged.pt")
assert "fnsft_trl" not in sys.modules
"""


@pytest.fixture(params=MIXED_NAMES)
def name(request):
    return request.param


@pytest.fixture
def mixtral():
    return NAMED["MixtralForCausalLM"].model()


@pytest.fixture
def ids():
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(base, mask, **settings):
    """A model with LoRA held to the neurons, and the frozen slices of its factors."""
    config = LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **settings})
    set_lora_targets(config, base, mask)
    model = get_peft_model(base, config)
    return model, constrain_lora(model, mask)


def fit(model, ids, optimizer=None, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def assert_changed_is(mask, before, model):
    after = state(model.merge_and_unload())
    sites = find_neuron_sites(model.get_base_model(), kind=mask.site)
    changed, others = changed_neurons(sites, before, after)
    assert others == []
    assert changed == mask


@pytest.mark.parametrize("site", SITES)
def test_the_factors_entries_of_a_neuron_are_those_that_its_weights_depend_on(name, site):
    """Every neuron's rows or columns of the weight change, and no other, when its entries of a factor change."""
    base = NAMED[name].model()
    mask = random_mask(base, site, share=1.1)
    config = LoraConfig(r=2)
    set_lora_targets(config, base, mask)
    config.init_lora_weights = False
    model = get_peft_model(base, config)
    seen = 0
    for s in find_neuron_sites(model, kind=site):
        for found in factor_slices(model, s, "default"):
            neuron = torch.tensor([found.part.first + found.part.count // 2 + 1])
            before = found.layer.get_delta_weight("default").detach()
            weight = found.factor.weight
            with torch.no_grad():
                view = weight.view(found.shape)
                touched = mask_positions(view, found.dims, found.positions(neuron)).expand(found.shape)
                assert int(touched.sum()) == found.rows(neuron, found.factor.weight).numel()
                view += touched
            changed = found.layer.get_delta_weight("default").detach() != before
            expected = found.part.mask(neuron, changed).expand_as(changed)
            assert torch.equal(changed, expected), found.part.full_name
            seen += 1
    assert seen == sum(
        len([p for p in s.layout.slices if "bias" not in p.parameter]) for s in find_neuron_sites(model, kind=site)
    )


@pytest.mark.parametrize("site", SITES)
def test_targets_are_the_weights_of_all_layers_with_trainable_neurons(name, site):
    base = NAMED[name].model()
    mask = random_mask(base, site)
    mask.layers[1][:] = False
    model, held = adapted(base, mask)
    wrapped = {key for key, module in model.named_modules() if isinstance(module, ParamWrapper)}
    assert wrapped
    assert not any("layers.1." in key for key in wrapped)
    assert held.masks_gradients
    assert not model.peft_config["default"].target_modules
    for s in find_neuron_sites(model, kind=site):
        weights = [p for p in s.layout.slices if "bias" not in p.parameter]
        assert len(list(factor_slices(model, s, "default"))) == (0 if s.layer == 1 else len(weights))


def test_biases_of_experts_do_not_train(ids):
    base = NAMED["GptOssForCausalLM"].model()
    before = state(base)
    model, _ = adapted(base, random_mask(base, "mlp_intermediate"))
    merged = state(fit(model, ids).merge_and_unload())
    for name, value in before.items():
        assert torch.equal(merged[name], value) == ("bias" in name or "experts" not in name)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"r": 3, "lora_alpha": 7, "rank_pattern": {".*down_proj": 4}, "alpha_pattern": {".*gate_up_proj": 5}},
    ],
    ids=str,
)
def test_variants_are_exact(name, settings, ids):
    base = NAMED[name].model()
    mask, before = random_mask(base, "mlp_intermediate"), state(base)
    model, _ = adapted(base, mask, **settings)
    assert_changed_is(mask, before, fit(model, ids))


@pytest.mark.parametrize("is_attached", [True, False])
def test_optimizers_with_state_in_8_bits_are_exact_when_attached(is_attached, ids):
    """They move zeros that have no gradient; attached, the factors are put back after every step."""
    bnb = pytest.importorskip("bitsandbytes")
    base = medium_experts()
    mask, before = random_mask(base, "mlp_intermediate"), state(base)
    model, held = adapted(base, mask, r=64)  # from 4,096 entries on, the state has 8 bits
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    if is_attached:
        held.attach(optimizer)
    after = state(fit(model, ids, optimizer).merge_and_unload())
    changed, others = changed_neurons(find_neuron_sites(base), before, after)
    assert others == []
    assert (changed == mask) == is_attached


def test_frozen_gradients_do_not_count_in_the_norm(ids):
    base = NAMED["MixtralForCausalLM"].model()
    mask = random_mask(base, "mlp_intermediate")
    model, _ = adapted(base, mask)
    model(input_ids=ids, labels=ids).loss.backward()
    for s in find_neuron_sites(model):
        for found in factor_slices(model, s, "default"):
            factor = found.factor.weight
            factor.data, kept = factor.grad, factor.data
            assert not found.rows((~mask).indices(s.layer), found.factor.weight).any()
            if found.part.side == "output":  # A has no gradient as long as B is zero
                assert found.rows(mask.indices(s.layer), found.factor.weight).any()
            factor.data = kept


def test_two_adapters_are_each_held_to_a_mask_of_their_own(name, ids):
    base = NAMED[name].model()
    before = state(base)
    masks = [random_mask(base, "mlp_intermediate", seed=seed) for seed in (0, 1)]
    config = LoraConfig(r=2)
    set_lora_targets(config, base, masks[0])
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=[], target_parameters=config.target_parameters))
    for adapter, mask in zip(("one", "two"), masks, strict=True):
        constrain_lora(model, mask, adapter_name=adapter)
        model.set_adapter(adapter)
        fit(model.train(), ids)
    model.set_adapter("two")
    assert_changed_is(masks[1], before, model)


def test_targets_that_peft_rewrites_are_held_too(ids):
    """Names of MLP layers mean the experts', as in older checkpoints; attention trains beside them."""
    base = NAMED["Qwen3MoeForCausalLM"].model()
    mask, before = random_mask(base, "mlp_intermediate"), state(base)
    model, _ = adapted(base, mask, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    after = state(fit(model, ids).merge_and_unload())
    changed, others = changed_neurons(find_neuron_sites(base), before, after)
    assert torch.equal(changed.layers[1], mask.layers[1])
    assert not changed.layers[0].any()  # of dense layers PEFT takes the names for those of experts
    assert others == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


def test_the_router_may_train_beside_the_neurons(mixtral, ids):
    mask, before = random_mask(mixtral, "mlp_intermediate"), state(mixtral)
    targets = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    model, _ = adapted(mixtral, mask, target_modules=[], target_parameters=targets)
    changed, others = changed_neurons(find_neuron_sites(mixtral), before, state(fit(model, ids).merge_and_unload()))
    assert changed == mask
    assert others == [f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout is 0\.1, and PEFT has no dropout on the weights of experts"),
        ({"init_lora_weights": "orthogonal"}, "does not exist on the weights of experts; use one of: True, gaussian"),
        ({"target_modules": ["q_proj"]}, "has no LoRA on an MLP module"),
        (
            {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj_bias"]},
            r"bare parameter .*layers\.0\.mlp\.experts\.gate_up_proj_bias cannot be held",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused(settings, message):
    base = NAMED["GptOssForCausalLM"].model()
    with pytest.raises(FNSFTError, match=message):
        adapted(base, random_mask(base, "mlp_intermediate"), **settings)


def test_an_adapter_that_already_changes_a_frozen_neuron_is_refused(mixtral):
    mask = random_mask(mixtral, "mlp_intermediate")
    config = LoraConfig(r=2)
    set_lora_targets(config, mixtral, mask)
    model = get_peft_model(mixtral, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with pytest.raises(FNSFTError, match=r"already changes neurons of .*experts that should be frozen"):
        constrain_lora(model, mask)


def test_factors_that_were_replaced_do_not_train(mixtral, ids):
    """As by sharding; the hooks on their gradients are gone."""
    model, _ = adapted(mixtral, random_mask(mixtral, "mlp_intermediate"))
    factor = model.get_submodule("base_model.model.model.layers.1.mlp.experts.lora_A.default")
    factor.weight = torch.nn.Parameter(factor.weight.detach().clone())
    logits(model, ids)
    with pytest.raises(FNSFTError, match=r"LoRA weight on .*layers\.1\.mlp\.experts\.down_proj was replaced"):
        model(ids)


def test_a_copy_without_masked_gradients_does_not_train(mixtral, ids):
    model, _ = adapted(mixtral, random_mask(mixtral, "mlp_intermediate"))
    twin = copy.deepcopy(model)
    logits(twin, ids)
    with pytest.raises(FNSFTError, match="in a copy of the model"):
        twin(ids)
    model(ids)


def test_the_guard_names_the_entry_of_a_factor_that_moved(name):
    base = NAMED[name].model()
    mask = random_mask(base, "mlp_intermediate")
    model, _ = adapted(base, mask)
    guard = FrozenNeuronGuard(model, mask)
    guard.on_train_begin(None, None, None)
    guard.check(step=0)
    site = find_neuron_sites(model)[1]
    assert site.experts
    for found in factor_slices(model, site, "default"):
        frozen = found.part.among((~mask).indices(1))
        weight = found.factor.weight.data
        kept = weight.clone()
        position = int(found.positions(frozen[-1:])[0])
        index = torch.tensor([position])
        front = weight.view(found.shape).movedim(found.dims, tuple(range(len(found.dims))))
        front[torch.unravel_index(index, front.shape[: len(found.dims)])] += 1
        letter = "B" if found.part.side == "output" else "A"
        pattern = rf"lora_{letter}\.default .*the first is neuron {int(frozen[-1])}"
        with pytest.raises(FrozenNeuronMoved, match=pattern):
            guard.check(step=1)
        weight.copy_(kept)
    guard.check(step=2)


@pytest.mark.slow
def test_checkpoints_are_plain_peft_files(ids, tmp_path):
    """Loaded and merged in one process that knows nothing of this package."""
    expected = {"ids": ids}
    masks = {}
    for name in MIXED_NAMES:
        base = NAMED[name].model()
        base.save_pretrained(tmp_path / name / "base")
        masks[name] = random_mask(base, "mlp_intermediate")
        model, _ = adapted(type(base).from_pretrained(tmp_path / name / "base"), masks[name])
        fit(model, ids).save_pretrained(tmp_path / name / "adapter")
        expected[name] = logits(model, ids).clone()
    save_file(expected, tmp_path / "expected.safetensors")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, mask in masks.items():
        before = state(NAMED[name].model())
        after = torch.load(tmp_path / name / "merged.pt")
        assert changed_neurons(find_neuron_sites(NAMED[name].model()), before, after) == (mask, [])
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
        assert load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
