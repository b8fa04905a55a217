"""Weights that hold deltas for the length of a product: what is there before, in and after it, when they may be
written, interruptions, copies, and several threads on one model."""

import contextlib
import copy
import pickle
import sys
import threading

import pytest
import torch
from helpers import changed_entries, random_mask
from peft import get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.tuner.held import HeldWeights, Write


class Module(nn.Module):
    """Parameters of every form that writes are made to."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"matrix": (8, 6), "vector": (8,), "experts": (3, 8, 6), "biases": (3, 8)}.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))


# name -> (parameter, view of it that is written to, dimension)
VIEWS = {
    "rows": ("matrix", lambda values: values, 0),
    "columns": ("matrix", lambda values: values, 1),
    "rows of the transposed": ("matrix", lambda values: values.T, 0),
    "entries": ("vector", lambda values: values, 0),
    "rows of an expert": ("experts", lambda values: values[1], 0),
    "columns of an expert": ("experts", lambda values: values[2].T, 1),
    "entries of an expert": ("biases", lambda values: values[1], 0),
}


def writes_to(module, *names, seeds=(0,)):
    """Random writes, of several that share positions for every seed."""
    writes = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            parameter, view, dim = VIEWS[name]
            tensor = view(getattr(module, parameter))
            positions = torch.randperm(tensor.shape[dim], generator=generator)[:4]
            values = torch.randn(tensor.movedim(dim, 0)[:4].shape, generator=generator)
            writes.append(Write(tensor, dim, positions, values))
    return writes


def values_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def versions_of(module):
    return {name: parameter._version for name, parameter in module.named_parameters()}


@torch.no_grad()
def sums(module, names, seeds):
    """Base values with everything added, by other means."""
    twin = copy.deepcopy(module)
    for tensor, dim, positions, values in writes_to(twin, *names, seeds=seeds):
        for position, row in zip(positions.tolist(), values, strict=True):
            tensor.select(dim, position).add_(row.to(tensor.dtype))
    return values_of(twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("names", [*([name] for name in VIEWS), list(VIEWS)])
def test_base_plus_deltas_are_there_in_the_block_and_at_no_other_time(names, seeds, dtype):
    module = Module(dtype)
    original, versions, held = values_of(module), versions_of(module), HeldWeights(module)
    expected = sums(module, names, seeds)
    for _ in range(2):
        with torch.no_grad(), held.hold(writes_to(module, *names, seeds=seeds)):
            assert changed_entries(expected, values_of(module)) == {}
        assert changed_entries(original, values_of(module)) == {}
        assert versions_of(module) == versions
        assert changed_entries(original, expected)


def test_what_others_have_written_stays():
    module = Module()
    held = HeldWeights(module)
    with torch.no_grad(), held.hold(writes_to(module, *VIEWS)):
        pass
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    changed = values_of(module)
    with torch.no_grad(), held.hold(writes_to(module, *VIEWS)):
        pass
    assert changed_entries(changed, values_of(module)) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("primitive", ["index_select", "index_add_", "index_copy_"])
@pytest.mark.parametrize("at", range(len(VIEWS)))
@pytest.mark.parametrize("is_done", [True, False])
def test_an_interruption_leaves_the_base_values_within_reach(is_done, at, primitive, error, monkeypatch):
    """A key pressed, or no memory left, before or after a write."""
    module = Module()
    original, held = values_of(module), HeldWeights(module)
    work, calls = getattr(torch.Tensor, primitive), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) != at + 1:
            return work(*args)
        if is_done:
            work(*args)
        raise error

    with monkeypatch.context() as patch, contextlib.suppress(error):
        patch.setattr(torch.Tensor, primitive, interrupted)
        with torch.no_grad(), held.hold(writes_to(module, *VIEWS, seeds=(0, 1))):
            pass
    assert len(calls) > at
    held.release()
    assert changed_entries(original, values_of(module)) == {}
    with torch.no_grad(), held.hold(writes_to(module, *VIEWS)):  # also shows that the lock is free
        assert changed_entries(original, values_of(module))
    assert changed_entries(original, values_of(module)) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_copies_hold_on_their_own(copied):
    module = Module()
    original, held = values_of(module), HeldWeights(module)
    twin = copied(held)
    with torch.no_grad(), held.hold(writes_to(module, *VIEWS)):  # and has the lock
        assert changed_entries(original, values_of(twin.module)) == {}
        (found,) = in_threads(1, lambda: values_in(twin))
        assert changed_entries(original, found)
    assert changed_entries(original, values_of(twin.module)) == {}


def values_in(held):
    with torch.no_grad(), held.hold(writes_to(held.module, *VIEWS)):
        return values_of(held.module)


def trains(module):
    module.matrix.requires_grad_(True)


def is_computed(module):
    del module.matrix
    module.matrix = torch.ones(8, 6)


def is_of_a_subclass(module):
    module.matrix = type("Other", (nn.Parameter,), {})(torch.ones(8, 6), requires_grad=False)


def comes_from_inference_mode(module):
    with torch.inference_mode():
        module.matrix = nn.Parameter(torch.ones(8, 6), requires_grad=False)


def has_a_hook(module):
    module.register_forward_hook(lambda *args: None)


def is_sharded(module):
    module._is_fsdp_managed_module = True  # as FSDP marks its modules


def is_offloaded(module):
    module.to("meta")


def is_of_another_precision(module):
    module.bfloat16()


TOUCHED = [
    *(trains, is_computed, is_of_a_subclass, comes_from_inference_mode, has_a_hook, is_sharded, is_offloaded),
    is_of_another_precision,
]


@pytest.mark.parametrize("touch", TOUCHED)
def test_only_plain_weights_that_nobody_else_touches_are_written(touch):
    module = Module()
    held = HeldWeights(module)
    assert held.can_hold(["matrix", "vector"], torch.ones(6))
    touch(module)
    assert not held.can_hold(["matrix", "vector"], torch.ones(6))


def test_weights_are_not_written_where_products_do_not_take_all_bits(monkeypatch):
    held, x = HeldWeights(Module()), torch.ones(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not held.can_hold(["matrix"], x)
    for dtype in (torch.bfloat16, torch.float16):
        assert not HeldWeights(Module(dtype)).can_hold(["matrix"], x.to(dtype))
    assert HeldWeights(Module(torch.float64)).can_hold(["matrix"], x.double())
    monkeypatch.setattr("fnsft_trl.tuner.held.multiplies_exactly", lambda x: False)  # TF32
    assert not held.can_hold(["matrix"], x)


def test_weights_are_not_written_in_a_transform():
    held, seen = HeldWeights(Module()), []

    def function(x):
        seen.append(held.can_hold(["matrix"], x))
        return x.sum()

    torch.func.grad(function)(torch.ones(6))
    torch.func.vmap(function)(torch.ones(2, 6))
    function(torch.ones(6))
    assert seen == [False, False, True]


# Several threads on one model


def in_threads(count, function):
    """What a function returns in each of several threads that start at once and change places often."""
    results, errors, start = [None] * count, [], threading.Barrier(count)

    def work(index):
        try:
            start.wait()
            results[index] = function()
        except BaseException as error:  # the test fails with it, not a thread that no one watches
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "the threads wait for each other"
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return results


TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, **TOKENS}
T5_SHAPE = {
    **{"d_model": 32, "d_kv": 16, "d_ff": 96, "num_heads": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0},
    **TOKENS,
}
MODELS = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=20, mlp_bias=True, **SHAPE)),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(num_hidden_layers=12, num_local_experts=4, **SHAPE)),
    "reads a weight in its forward pass": lambda: T5ForConditionalGeneration(T5Config(num_layers=8, **T5_SHAPE)),
}
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(kind, dtype=torch.float32):
    """A model with many layers and two adapters, both active, with random deltas, as it comes from loading."""
    torch.manual_seed(0)
    base = MODELS[kind]().to(dtype)
    masks = [random_mask(base, "mlp_intermediate", seed=seed) for seed in (0, 1)]
    model = get_peft_model(base, NeuronTunerConfig(neurons=masks[0].to_ranges()))
    model.add_adapter("other", NeuronTunerConfig(neurons=masks[1].to_ranges()))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def base_values(model):
    """The base model's parameters as they lie in memory."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "neuron_delta" not in name}


def run(model, with_gradients=False):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.set_grad_enabled(with_gradients):
        return model(input_ids=IDS, use_cache=False, **inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_threads_compute_what_one_computes_and_leave_the_weights(kind, count, with_gradients):
    """After loading, after `eval()` and after another adapter was made active; there is no first pass that writes."""
    model = adapted(kind)
    original, versions = base_values(model), versions_of(model)
    for names in (["default", "other"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected = run(copy.deepcopy(model))
        for found in in_threads(count, lambda: [run(model, with_gradients) for _ in range(3)]):
            assert all(torch.equal(logits, expected) for logits in found)
        model.eval()
    assert changed_entries(original, base_values(model)) == {}
    assert versions_of(model) == versions


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_threads_that_train_take_turns(kind, count):
    """Each with a loss of its own, and gradients that are taken at once; the weights are written all the time."""
    model = adapted(kind).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    original = base_values(model)

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(run(model, True).square().mean(), trained, allow_unused=True)

    expected = gradients()
    assert any(found is not None and found.any() for found in expected)
    for found in in_threads(count, lambda: [gradients() for _ in range(2)]):
        for grads in found:
            for mine, right in zip(grads, expected, strict=True):
                assert (mine is None and right is None) or torch.equal(mine, right)
    assert changed_entries(original, base_values(model)) == {}
