"""ProtectedWeights: D U = 0 of every kind of map, the soft form, and layers that answer as before, everywhere."""

import copy
from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import VOCABULARY, medium_experts, random_mask, state, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from fnsft_trl import FNSFTError, NeuronTunerConfig, constrain_full, find_neuron_sites
from fnsft_trl.constraints import trainable_neurons
from fnsft_trl.constraints.protection import ProtectedWeight, protect_weights
from fnsft_trl.constraints.trained_maps import TrainedMap, check_adapter, trained_maps
from fnsft_trl.discovery.directions import KeptDirections, KeptText
from fnsft_trl.discovery.inputs import reached_linears
from fnsft_trl.neurons.sites import base_model


IDS = torch.randint(2, VOCABULARY - 10, (6, 9), generator=torch.Generator().manual_seed(0))
MLP = ["gate_proj", "up_proj", "down_proj"]


def protected(model, leading=3, strength=1.0, trainable=None):
    """A model's trained maps, protected on some tokens, and the directions."""
    maps, left = trained_maps(model, trainable, reached_linears(model, IDS[0].tolist()))
    modules = list(dict.fromkeys(each.module for each in maps))
    kept = KeptDirections.find(model, modules, {"a": KeptText(IDS.tolist())}, leading=leading, title=None)
    for name, parameter in base_model(model).named_parameters():
        if name in left:
            parameter.requires_grad_(False)
    bases = {name: each.basis for each in kept.inputs for name in each.modules}
    return protect_weights(maps, bases, strength=strength), kept


def step(model, weights, *, lr=0.05, seed=1, optimizer=torch.optim.AdamW, **settings):
    """Two steps with random gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepping = optimizer(parameters, lr=lr, **settings)
    weights.attach(stepping)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        stepping.step()


def deltas(model, share=0.5):
    mask = random_mask(model, "mlp_intermediate", share)
    return get_peft_model(model, NeuronTunerConfig(neurons=mask.to_ranges()))


MADE = {
    "full": lambda model: model,
    "lora": lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", *MLP])),
    "deltas": deltas,
}


@pytest.mark.parametrize("way", MADE)
def test_nothing_is_left_along_the_directions_and_a_control_has_it_there(way, monkeypatch):
    model = MADE[way](tiny_model("llama"))
    weights, _ = protected(model)
    control = copy.deepcopy(model)
    step(model, weights)
    assert weights.left() <= (2.0**-23 if way == "full" else 1e-6)
    assert Counter(w.map.holds_base for w in weights.weights) == {way == "full": len(weights.weights)}
    monkeypatch.setattr(ProtectedWeight, "project", lambda *_: None)
    free, _ = protected(control)
    step(control, free)
    assert free.left() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_protected_layer_answers_as_before_to_inputs_along_the_directions(architecture):
    model = architecture.model()
    weights, kept = protected(model, leading=2)
    before = copy.deepcopy(model)
    step(model, weights)
    for each in kept.inputs:
        inputs = (each.basis @ torch.randn(each.basis.shape[1], 4, dtype=torch.float64)).T.float()
        others = torch.randn(4, each.width)
        for name in each.modules:
            old, new = before.get_submodule(name), model.get_submodule(name)
            with torch.no_grad():
                torch.testing.assert_close(new(inputs), old(inputs), rtol=1e-4, atol=2e-5)
                assert not torch.allclose(new(others), old(others), atol=1e-2)
    trained = {w.map.module for w in weights.weights}
    if architecture.dense:
        assert {name for s in find_neuron_sites(model) for name in (s.down_name, *s.up_names)} <= trained
    same = {name for name, value in state(before).items() if torch.equal(value, state(model)[name])}
    assert {name for name in state(before) if name.removesuffix(".weight") not in trained} <= same


def test_entries_of_frozen_neurons_keep_their_bits():
    model = tiny_model("llama")
    trainable = trainable_neurons(model, random_mask(model, "mlp_intermediate", 0.5), "selected")
    frozen = constrain_full(model, trainable, train_other=False)
    weights, kept = protected(model, trainable=trainable)
    before = state(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    weights.attach(optimizer)  # and nothing puts frozen values back
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for part in (part for part in frozen.slices if part.parameter.requires_grad):
        part.parameter.grad.masked_fill_(part.mask, 0)
    optimizer.step()
    for site in find_neuron_sites(model):
        members = trainable.layers[site.layer]
        change = state(model)[f"{site.down_name}.weight"] - before[f"{site.down_name}.weight"]
        assert not change[:, ~members].any()
        assert change[:, members].any()
        left = (change.double() @ kept.of(site.down_name).basis).norm() / change.norm()
        assert left < 1e-5
        for name in site.up_names:
            change = state(model)[f"{name}.weight"] - before[f"{name}.weight"]
            assert not change[~members].any()
            assert (change.double() @ kept.of(name).basis).norm() / change.norm() < 1e-5


def test_a_strength_below_1_leaves_the_rest_of_each_step():
    layer, free = nn.Linear(12, 5, bias=False), nn.Linear(12, 5, bias=False)
    free.load_state_dict(layer.state_dict())
    basis = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q
    weights = protect_weights([TrainedMap("x", layer.weight, holds_base=True)], {"x": basis}, strength=0.75)
    base = layer.weight.detach().clone().double()
    for model, held in ((layer, weights), (free, None)):
        optimizer = torch.optim.SGD([model.weight], lr=0.1)
        if held is not None:
            held.attach(optimizer)
        for number in range(3):
            model.weight.grad = torch.randn(5, 12, generator=torch.Generator().manual_seed(number))
            optimizer.step()
    change, whole = layer.weight.double() - base, free.weight.double() - base
    torch.testing.assert_close(change @ basis, 0.25 * whole @ basis, rtol=1e-4, atol=1e-6)
    outside = torch.eye(12, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(change @ outside, whole @ outside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_subset", [False, True])
def test_at_the_end_no_more_is_left_than_one_rounding_of_the_weights(is_subset):
    layer = nn.Linear(576, 96, bias=False)
    before = layer.weight.detach().clone().double()
    basis = torch.linalg.qr(torch.randn(576, 200, generator=torch.Generator().manual_seed(0)).double()).Q
    rows = torch.arange(0, 96, 2) if is_subset else None
    found = TrainedMap("x", layer.weight, rows=rows, holds_base=True)
    weights = protect_weights([found], {"x": basis.float().double()})
    optimizer = torch.optim.SGD([layer.weight], lr=1e-3)
    weights.attach(optimizer)
    for number in range(6):
        layer.weight.grad = torch.randn(96, 576, generator=torch.Generator().manual_seed(number))
        layer.weight.grad[1::2] *= not is_subset
        optimizer.step()
    products = weights.left()  # of float32, whose sums are longer than one rounding
    weights.settle()
    assert weights.left() < min(products / 2, 2.0**-24)
    along = (layer.weight.detach().double() - before) @ weights.weights[0].whole
    assert along.norm() <= 2.0**-23 * before.norm()
    if is_subset:
        assert torch.equal(layer.weight.detach()[1::2].double(), before[1::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_measured(dtype):
    model = tiny_model("llama").to(dtype)
    weights, _ = protected(model)
    step(model, weights, eps=1e-3)  # 1e-8 is 0 in float16
    assert 0 <= weights.left() < (1e-6 if dtype == torch.float64 else 2e-2)


def test_columns_as_few_as_directions_are_left_alone_and_all_of_them_are_refused():
    model = deltas(tiny_model("llama"), share=0.1)
    weights, _ = protected(model, leading=8)
    assert weights.closed == [site.down_name for site in find_neuron_sites(base_model(model))]
    before = state(model)
    step(model, weights)
    for name in weights.closed:
        key = f"base_model.model.{name}.neuron_delta_weight.default.values"
        assert torch.equal(before[key], state(model)[key])
    with pytest.raises(FNSFTError, match="fill all inputs that train"):
        protected(deltas(tiny_model("llama"), share=0.1), leading=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA divides"),
        ({"modules_to_save": ["lm_head"]}, "trains modules as a whole"),
        ({"lora_bias": True}, "bias of lora_B"),
        ({"bias": "all"}, "answer to every input"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": False}, "random weight change"),
        ({"target_parameters": ["x.gate_up_proj"]}, "routed"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
    ],
)
def test_adapters_without_directions_are_refused_by_name(changes, message):
    with pytest.raises(FNSFTError, match=message):
        check_adapter(LoraConfig(r=4, **changes))


def test_what_an_adapter_trains_without_directions_is_refused():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(FNSFTError, match=r"embed_tokens.* trains, and is no weight of a linear layer"):
        protected(model)
    with pytest.raises(FNSFTError, match=r"experts.* trains, and is no weight of a linear layer"):
        protected(deltas(medium_experts()))
    brought = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=MLP))
    for module in brought.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and hasattr(module["default"], "weight"):
            nn.init.normal_(module["default"].weight)
    with pytest.raises(FNSFTError, match="along the directions to protect already"):
        protected(brought)
