"""A layer that others have touched: with deltas it computes what it would with changed weights, or it is refused.

Every case does something to a linear layer or to the experts of a layer, before PEFT wraps it or after, and compares
logits and gradients with those of a plain model whose weights contain the deltas, and to which the same was done.
"""

import copy
import io
import threading
from collections import defaultdict

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from architectures import ARCHITECTURES
from helpers import random_mask, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize, prune

from fnsft_trl import FNSFTError, NeuronTunerConfig, find_neuron_sites, lesion
from fnsft_trl.tuner.hooks import call_with


EXPERTS = {architecture.name: architecture.model for architecture in ARCHITECTURES if not architecture.dense}
# name -> (a model, the module that is touched, one of its weights)
TARGETS = {
    "linear, neurons are outputs": (lambda: tiny_model("llama"), "model.layers.1.mlp.up_proj", "weight"),
    "linear, neurons are inputs": (lambda: tiny_model("llama"), "model.layers.1.mlp.down_proj", "weight"),
    "conv1d": (lambda: tiny_model("gpt2"), "transformer.h.1.mlp.c_fc", "weight"),
    "experts": (EXPERTS["MixtralForCausalLM"], "model.layers.0.mlp.experts", "down_proj"),
    "experts, transposed, biases": (EXPERTS["GptOssForCausalLM"], "model.layers.1.mlp.experts", "gate_up_proj"),
}
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(params=["before", "after"])
def when(request):
    return request.param


def wrap(model):
    """The model with random deltas, and the module inside the layer that is named."""
    mask = random_mask(model, "mlp_intermediate")
    model = get_peft_model(model, NeuronTunerConfig(neurons=mask.to_ranges(), task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def base_of(model, name):
    return model.get_submodule(f"base_model.model.{name}").base_layer


def outcome(model, training):
    """Logits, and the gradients of all parameters that have one."""
    model.train(training).zero_grad()
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, found.logits.detach(), atol=1e-5, rtol=1e-5)
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, reference):
    """In both modes, the model computes what the reference does, whose weights contain the deltas."""
    mask = random_mask(reference, "mlp_intermediate")
    for training in (True, False):
        logits, gradients = outcome(model, training)
        expected, of_weights = outcome(reference.requires_grad_(True), training)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for site in find_neuron_sites(reference):
            for part in site.layout.slices:
                weight = of_weights[part.full_name]
                right = part.select(weight, part.indices(mask.indices(site.layer)))
                own = gradients[f"base_model.model.{part.module_name}.neuron_delta_{part.parameter}.default.values"]
                torch.testing.assert_close(own.view_as(right), right, atol=1e-5, rtol=1e-3)


# Hooks, which work on what the layer gets and gives


def scaled_input(module):
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3, *inputs[1:]))


def scaled_output(module):
    module.register_forward_hook(lambda module, inputs, output: output * 3)


def scaled_with_kwargs(module):
    module.register_forward_hook(lambda module, inputs, kwargs, output: output * 3, with_kwargs=True, always_call=True)


def scaled_gradient(module):
    module.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else g * 3 for g in into))


def scaled_gradient_of_the_output(module):
    module.register_full_backward_pre_hook(lambda module, out: tuple(g * 3 for g in out))


def scaled_by_all(module):
    """A hook of all modules that knows the one it is for."""
    factors = defaultdict(lambda: 1, {module: 3})
    modules.register_module_forward_hook(lambda module, inputs, output: _scaled(output, factors[module]))


def _scaled(output, factor):
    return output * factor if factor != 1 else output


def by_what_the_module_is(module):
    kind = type(module)

    def hook(module, inputs, output):
        module.seen = getattr(module, "seen", 0) + 1
        return output * (1 + isinstance(module, kind) + (module.training == module.training))

    module.register_forward_hook(hook)


def moved_by_accelerate(module):
    add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))


def moved_by_accelerate_and_scaled(module):
    scaled_input(module)
    moved_by_accelerate(module)
    scaled_output(module)


def no_longer_moved_by_accelerate(module):
    moved_by_accelerate(module)
    remove_hook_from_module(module)


HOOKS = [
    *(scaled_input, scaled_output, scaled_with_kwargs, scaled_gradient, scaled_gradient_of_the_output, scaled_by_all),
    *(by_what_the_module_is, moved_by_accelerate, moved_by_accelerate_and_scaled, no_longer_moved_by_accelerate),
]


@pytest.fixture
def no_hooks_of_all_modules():
    """Those that a test leaves are taken away."""
    yield
    for hooks in (modules._global_forward_hooks, modules._global_forward_pre_hooks, modules._global_backward_hooks):
        hooks.clear()


@pytest.mark.slow
@pytest.mark.parametrize("touch", HOOKS)
def test_hooks_see_what_goes_into_the_changed_layer_and_comes_out(touch, target, when, no_hooks_of_all_modules):
    make, name, _ = TARGETS[target]
    reference = wrap(make()).merge_and_unload()
    base = make()
    if when == "before":
        touch(base.get_submodule(name))
    model = wrap(base)
    if when == "after":
        touch(base_of(model, name))
    touch(reference.get_submodule(name))
    check(model, reference)


def test_a_hook_that_comes_between_two_passes_and_goes_again(target):
    make, name, _ = TARGETS[target]
    reference, model = wrap(make()).merge_and_unload(), wrap(make())
    check(model, reference)
    handles = [
        m.register_forward_hook(lambda *args: args[-1] * 3)
        for m in (base_of(model, name), reference.get_submodule(name))
    ]
    check(model, reference)
    for handle in handles:
        handle.remove()
    check(model, reference)


def test_what_hooks_keep_is_what_came_out_and_stays(target, when):
    make, name, _ = TARGETS[target]
    reference = wrap(make()).merge_and_unload().requires_grad_(True)
    base, kept = make(), {"model": [], "reference": []}

    def touch(module, whose):
        module.register_forward_hook(lambda module, inputs, output: kept[whose].append(output))

    if when == "before":
        touch(base.get_submodule(name), "model")
    model = wrap(base)
    if when == "after":
        touch(base_of(model, name), "model")
    touch(reference.get_submodule(name), "reference")
    for training in (True, False):
        for each in (model, reference):
            outcome(each, training)
    for found, expected in zip(kept["model"], kept["reference"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_lesion_from_before_holds_with_deltas_or_says_that_it_has_to_come_later(target):
    make, _, _ = TARGETS[target]
    base, reference = make(), wrap(make()).merge_and_unload()
    mask = random_mask(base, "mlp_intermediate", share=0.5, seed=4)
    lesion(base, mask)
    lesion(reference, mask)
    model = wrap(base)
    if "experts" in target:
        check(model, reference)
    else:
        with pytest.raises(FNSFTError, match="remove the mask, and put it on again"):
            model(input_ids=IDS)


# What becomes of the weights


@torch.no_grad()
def written(module, name):
    getattr(module, name).add_(0.1)


def written_without_a_trace(module, name):
    getattr(module, name).data.mul_(1.5)


def replaced(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2, requires_grad=False))


def replaced_by_one_that_trains(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


def data_replaced(module, name):
    getattr(module, name).data = getattr(module, name).data * 2


def loaded(module, name):
    module.load_state_dict({**module.state_dict(), name: module.state_dict()[name] * 0.5})


def trains(module, name):
    getattr(module, name).requires_grad_(True)


WRITES = [written, written_without_a_trace, replaced, replaced_by_one_that_trains, data_replaced, loaded, trains]


@pytest.mark.parametrize("touch", WRITES)
def test_deltas_are_added_to_the_weight_that_there_is(touch, target, when):
    make, name, weight = TARGETS[target]
    plain = make()
    touch(plain.get_submodule(name), weight)
    reference = wrap(plain).merge_and_unload()
    base = make()
    if when == "before":
        touch(base.get_submodule(name), weight)
    model = wrap(base)
    if when == "after":
        outcome(model, True)
        touch(base_of(model, name), weight)
    check(model, reference)
    merged = model.merge_and_unload()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, atol=1e-6, rtol=1e-6)


class Scaled(nn.Module):
    def forward(self, values):
        return values * 1.5


def pruned(module, name):
    prune.random_unstructured(module, name, 0.3)


def parametrized(module, name):
    parametrize.register_parametrization(module, name, Scaled())


def weight_normed(module, name):
    nn.utils.parametrizations.weight_norm(module, name)


def weight_normed_by_a_hook(module, name):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, name)


def spectral_normed_by_a_hook(module, name):
    nn.utils.spectral_norm(module, name, n_power_iterations=4)


COMPUTED = [pruned, parametrized, weight_normed, weight_normed_by_a_hook, spectral_normed_by_a_hook]


@pytest.mark.parametrize("touch", COMPUTED)
def test_deltas_are_added_to_a_weight_that_is_computed_from_others(touch, target, when):
    make, name, weight = TARGETS[target]
    twin, plain = make(), make()
    torch.manual_seed(0)
    touch(twin.get_submodule(name), weight)
    twin.eval()(input_ids=IDS)
    plain.get_submodule(name).load_state_dict(
        {**plain.get_submodule(name).state_dict(), weight: getattr(twin.get_submodule(name), weight).detach()}
    )
    reference, base = wrap(plain).merge_and_unload(), make()
    if when == "before":
        torch.manual_seed(0)
        touch(base.get_submodule(name), weight)
        if "experts" in target:
            with pytest.raises(FNSFTError, match=r"are not understood|several modules with the weights of experts"):
                wrap(base)
            return
    model = wrap(base)
    if when == "after":
        torch.manual_seed(0)
        touch(base_of(model, name), weight)
    model.eval()
    if touch is spectral_normed_by_a_hook:  # in training every pass changes the norm
        expected, found = (each(input_ids=IDS).logits for each in (reference, model))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    else:
        check(model, reference)
    with pytest.raises(FNSFTError, match="whose weight is computed from other tensors"):
        model.merge_adapter()


# What is refused


def test_a_forward_of_its_own_is_refused(target, when):
    """Nobody knows what it makes of a changed weight."""
    make, name, _ = TARGETS[target]
    base = make()

    def touch(module):
        own = module.forward
        module.forward = lambda *inputs: own(*inputs) * 3

    if when == "before":
        touch(base.get_submodule(name))
    model = wrap(base)
    if when == "after":
        outcome(model, True)
        touch(base_of(model, name))
    for training in (True, False):
        with pytest.raises(FNSFTError, match="has a forward that was set on it alone"):
            model.train(training)(input_ids=IDS)
    with model.disable_adapter():
        model(input_ids=IDS)


def share(one, other, weight):
    setattr(one, weight, getattr(other, weight))


def share_memory(one, other, weight):
    getattr(one, weight).data = getattr(other, weight).data


@pytest.mark.parametrize("how", [share, share_memory])
def test_weights_that_two_modules_share_are_refused(how, target):
    """Merged, each would get the other's deltas."""
    make, name, weight = TARGETS[target]
    base = make()
    others = {".0.": ".1.", ".1.": ".0."}
    other = next(name.replace(here, there) for here, there in others.items() if here in name)
    how(base.get_submodule(other), base.get_submodule(name), weight)
    with pytest.raises(FNSFTError, match=r"share a weight|shares a weight with"):
        wrap(base)


@pytest.mark.parametrize("how", [share, share_memory])
def test_weights_that_the_parts_of_one_mlp_share_are_refused(how):
    base = tiny_model("llama")
    how(base.model.layers[1].mlp.gate_proj, base.model.layers[1].mlp.up_proj, "weight")
    with pytest.raises(FNSFTError, match=r"mlp\.(gate|up)_proj shares a weight with model\.layers\.1"):
        wrap(base)
    mask = random_mask(base, "mlp_intermediate")
    mask.layers[1][:] = False
    get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges()))


# Other ways to call a model, and copies


def test_other_parameters_for_one_call(target):
    """`functional_call` puts tensors in the places of parameters, trained ones and others."""
    make, _, _ = TARGETS[target]
    model = wrap(make())
    expected, gradients = outcome(model, True)
    for training in (True, False):
        model.train(training)
        parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        found = torch.func.functional_call(twin, parameters, kwargs={"input_ids": IDS, "labels": IDS})
        torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
        found.loss.backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear, neurons are outputs", "linear, neurons are inputs", "conv1d"])
def test_transforms_of_torch_func(kind, training):
    make, name, _ = TARGETS[kind]
    model = wrap(make()).train(training)
    layer = model.get_submodule(f"base_model.model.{name}")
    draw = torch.Generator().manual_seed(2)
    width = layer.base_layer.nx if kind == "conv1d" else layer.base_layer.in_features
    x = torch.randn(3, 5, width, generator=draw)
    expected = layer(x).detach()
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected, atol=1e-5, rtol=1e-5)
    trained = {name: p.detach() for name, p in layer.named_parameters() if "neuron_delta" in name}
    gradients = torch.func.grad(lambda values: torch.func.functional_call(layer, values, (x,)).square().sum())(trained)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if "neuron_delta" in name:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)
    direction = torch.randn(x.shape, generator=draw)
    _, slope = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(slope, layer(x + direction).detach() - expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("at", ["before a step", "between forward and backward", "merged"])
def test_copies_compute_the_same_and_stand_on_their_own(copied, at, target):
    make, _, _ = TARGETS[target]
    reference, model = wrap(make()).merge_and_unload(), wrap(make()).train()
    outcome(model, True)
    loss = model(input_ids=IDS, labels=IDS).loss if at.startswith("between") else None
    if at == "merged":
        model.merge_adapter()
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    if loss is not None:
        loss.backward()
    if at == "merged":
        twin.unmerge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name:
                parameter.zero_()
    check(twin, reference)


def test_another_precision_in_the_middle(target):
    make, _, _ = TARGETS[target]
    reference, model = wrap(make()).merge_and_unload().bfloat16(), wrap(make())
    outcome(model, True)
    for training in (True, False):
        found = model.train(training).bfloat16()(input_ids=IDS).logits.float()
        expected = reference.train(training)(input_ids=IDS).logits.float()
        assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    check(model.float(), wrap(make().bfloat16().float()).bfloat16().float().merge_and_unload())


@pytest.mark.parametrize("kind", ["linear, neurons are outputs", "linear, neurons are inputs", "conv1d"])
def test_another_method_around_the_layer(kind):
    make, name, _ = TARGETS[kind]
    lora = LoraConfig(r=2, target_modules=[name.rpartition(".")[2]], init_lora_weights=False)
    torch.manual_seed(3)
    reference = get_peft_model(wrap(make()).merge_and_unload(), lora)
    torch.manual_seed(3)
    model = get_peft_model(wrap(make()), lora)
    for training in (True, False):
        expected, found = (each.train(training)(input_ids=IDS).logits.detach() for each in (reference, model))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model.merge_adapter()  # LoRA's; the deltas stay
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, found, atol=1e-4, rtol=1e-4)


# call_with


def test_a_module_called_with_another_forward_is_itself_to_its_hooks():
    module, seen = nn.Linear(2, 2), []

    def hook(called, inputs, output):
        called.seen = output
        seen.append((called == module, {module: "known"}.get(called), isinstance(called, nn.Linear), called.weight))

    module.register_forward_hook(hook)
    result = call_with(module, lambda x: x + 1, torch.ones(2))
    assert torch.equal(result, torch.full((2,), 2.0))
    assert seen == [(True, "known", True, module.weight)]
    assert module.seen is result
    assert "forward" not in vars(module)
    assert torch.equal(module(torch.ones(2)), module.forward(torch.ones(2)))


def test_a_module_is_called_with_several_forwards_at_once():
    module, inside = nn.Linear(2, 2), threading.Barrier(2, timeout=60)
    module.register_forward_pre_hook(lambda *args: None)
    results = {}

    def work(number):
        def forward(x):
            inside.wait()
            return x + number

        results[number] = call_with(module, forward, torch.zeros(1))

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: torch.ones(1), 2: torch.full((1,), 2.0)}
