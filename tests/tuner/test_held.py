"""Weights that hold deltas: what they hold and when, copies, interruptions, and several threads on one model."""

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

from fnsft_trl import FNSFTError, NeuronTunerConfig
from fnsft_trl.neurons import WeightSlice
from fnsft_trl.neurons.layout import write_positions
from fnsft_trl.tuner.held import Delta, HeldWeights


class Module(nn.Module):
    """Parameters of every form that a slice can have."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"rows": (8, 6), "columns": (700, 8), "bias": (8,), "experts": (3, 8, 6), "biases": (3, 8)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))


SLICES = {
    "rows": WeightSlice("module", "rows", (0,), (0,), "output", 8, 8),
    "columns": WeightSlice("module", "columns", (1,), (0,), "input", 8, 8),
    "bias": WeightSlice("module", "bias", (0,), (0,), "output", 8, 8),
    "experts": WeightSlice("module", "experts", (0, 1), (0, 4), "output", 12, 4),
    "biases": WeightSlice("module", "biases", (1,), (0,), "output", 8, 8),
}
NEURONS = {"one": [1, 2, 5], "three": [5, 0]}


def deltas_of(module, *adapters):
    """Random deltas in float32, of adapters that share a neuron."""
    deltas = {}
    for adapter in adapters:
        generator = torch.Generator().manual_seed(len(adapter))
        deltas[adapter] = []
        for slice_ in SLICES.values():
            positions = slice_.indices(torch.tensor(NEURONS[adapter]))
            shape = slice_.select(slice_.tensor(nn.ModuleDict({"module": module})), positions).shape
            values = torch.randn(shape, generator=generator)
            deltas[adapter].append(Delta(slice_, positions, nn.Parameter(values)))
    return deltas


def values_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
def sums(original, deltas):
    """Base + deltas, added up at no less than float32 and rounded once."""
    expected = {}
    for name, values in original.items():
        total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
        for slice_, positions, rows in (delta for of_adapter in deltas.values() for delta in of_adapter):
            if slice_.parameter == name:
                write_positions(total, slice_.dims, positions, slice_.select(total, positions) + rows)
        expected[name] = total.to(values.dtype)
    return expected


def bring(held, deltas, **options):
    with held.hold(deltas, **options) as state:
        return state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [("one",), ("three",), ("one", "three"), ("three", "one")])
def test_base_plus_deltas_are_held_in_the_block_and_after_it_until_release(adapters, dtype):
    module = Module(dtype)
    original, deltas = values_of(module), deltas_of(module, *adapters)
    expected = sums(original, deltas)
    assert changed_entries(original, expected).keys() == SLICES.keys()
    held = HeldWeights(module)
    with held.hold(deltas):
        assert held.names == adapters
        assert changed_entries(expected, values_of(module)) == {}
    assert changed_entries(expected, values_of(module)) == {}
    held.release()
    assert held.names == ()
    assert changed_entries(original, values_of(module)) == {}


def test_what_is_merged_stays_when_the_rest_is_released():
    module = Module()
    original, held = values_of(module), HeldWeights(module)
    both = deltas_of(module, "one", "three")
    merged = {"one": both["one"]}
    bring(held, both)
    held.release(merged)
    assert changed_entries(sums(original, merged), values_of(module)) == {}
    held.release()
    assert changed_entries(original, values_of(module)) == {}


def versions_of(module):
    return {name: parameter._version for name, parameter in module.named_parameters()}


def test_weights_are_written_when_a_delta_changed_or_someone_asks_and_at_no_other_time():
    module = Module()
    original, held, deltas = values_of(module), HeldWeights(module), deltas_of(module, "one")

    def is_written(**options):
        before = versions_of(module)
        bring(held, deltas, **options)
        assert changed_entries(sums(original, deltas), values_of(module)) == {}
        changed = [versions_of(module)[name] != version for name, version in before.items()]
        assert all(changed) or not any(changed)
        return all(changed)

    assert is_written()
    assert not is_written()
    with torch.no_grad():
        deltas["one"][2].values.add_(1)
    assert is_written()
    assert not is_written()
    deltas["one"][2].values.data.add_(1)  # leaves no trace
    assert is_written(refresh=True)
    assert not is_written()
    deltas["one"][2].values.data.add_(1)
    held.expire()
    assert is_written()
    assert not is_written()
    before = versions_of(module)
    held.release()
    held.release()
    assert all(0 < versions_of(module)[name] - version <= 2 for name, version in before.items())  # 2 blocks of columns


def test_a_backward_pass_takes_over_what_its_forward_pass_held():
    module = Module()
    original, held, deltas = values_of(module), HeldWeights(module), deltas_of(module, "one")
    state = bring(held, deltas)
    bring(held, deltas_of(module, "three"))
    assert changed_entries(sums(original, deltas), values_of(module))
    held.take_over(deltas, state)
    assert changed_entries(sums(original, deltas), values_of(module)) == {}
    with torch.no_grad():
        deltas["one"][0].values.add_(1)
    with pytest.raises(FNSFTError, match="changed between a forward pass and its backward pass"):
        held.take_over(deltas, state)
    held.release()
    assert changed_entries(original, values_of(module)) == {}


def test_weights_that_were_sharded_while_they_held_deltas_are_an_error():
    module = Module()
    held, deltas = HeldWeights(module), deltas_of(module, "one")
    assert held.can_hold
    bring(held, deltas)
    module._is_fsdp_managed_module = True  # as FSDP marks its modules
    assert not held.can_hold
    with pytest.raises(FNSFTError, match=r"call model\.base_model\.release\(\) before sharding it"):
        held.release()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", ["_take", "_put"])
@pytest.mark.parametrize("at", range(2 * len(SLICES)))
@pytest.mark.parametrize(
    ("before", "after"), [((), ("one",)), (("one",), ()), (("one",), ("three",)), (("one",), ("three", "one"))]
)
def test_an_interruption_leaves_the_base_values_within_reach(before, after, at, method, error, monkeypatch):
    """A key pressed, or no memory left, in the middle of writing."""
    module = Module()
    original, held, deltas = values_of(module), HeldWeights(module), deltas_of(module, "one", "three")
    bring(held, {name: deltas[name] for name in before})
    after = {name: deltas[name] for name in after}
    work, calls = getattr(HeldWeights, method), []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return work(self, *args)

    with monkeypatch.context() as patch, contextlib.suppress(error):
        patch.setattr(HeldWeights, method, interrupted)
        bring(held, after)
    bring(copy.deepcopy(held), {})
    twin = copy.deepcopy(held)
    bring(held, after)  # also shows that the lock is free
    assert changed_entries(sums(original, after), values_of(module)) == {}
    for one in (held, twin):
        one.release()
        assert changed_entries(original, values_of(one.module)) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
@pytest.mark.parametrize("adapters", [(), ("one",)])
def test_copies_hold_on_their_own(adapters, copied):
    module = Module()
    original, held, deltas = values_of(module), HeldWeights(module), deltas_of(module, "one")
    bring(held, {name: deltas[name] for name in adapters})
    twin = copied(held)
    assert twin.names == adapters
    assert changed_entries(values_of(module), values_of(twin.module)) == {}
    held.show()
    with held.hold(deltas):  # and has the lock
        (found,) = in_threads(1, lambda: (bring(twin, deltas), values_of(twin.module))[1])
        assert changed_entries(sums(original, deltas), found) == {}
        twin.release()
        assert changed_entries(original, values_of(twin.module)) == {}
        assert changed_entries(sums(original, deltas), values_of(module)) == {}


def test_base_values_follow_their_module_to_another_precision():
    module = Module()
    held, deltas = HeldWeights(module), deltas_of(module, "one")
    expected = {name: values.double() for name, values in values_of(module).items()}
    bring(held, deltas)
    held.move(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    module.double()
    held.release()
    assert changed_entries(expected, values_of(module)) == {}


def test_whether_what_is_held_is_finite():
    module = Module()
    held, deltas = HeldWeights(module), deltas_of(module, "one", "three")
    bring(held, deltas)
    assert held.is_finite()
    with torch.no_grad():
        deltas["three"][3].values[1, 2] = float("inf")
    bring(held, deltas)
    assert not held.is_finite()


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


def test_blocks_run_at_once_unless_a_weight_was_shown():
    """Some models read a weight in every forward pass, which puts the base values back while others compute."""
    module = Module()
    original, held, deltas = values_of(module), HeldWeights(module), deltas_of(module, "one")
    for is_shown in (False, True, False):
        if is_shown:
            held.show()
        with held.hold(deltas):
            other = threading.Thread(target=bring, args=(held, deltas), daemon=True)
            other.start()
            other.join(timeout=0.2 if is_shown else 60)
            assert other.is_alive() == is_shown
        other.join(timeout=60)
        assert not other.is_alive()
        held.expire()  # as `eval()` does
    held.show()
    with held.hold(deltas):
        other = threading.Thread(target=held.release, daemon=True)
        other.start()
        other.join(timeout=0.2)
        assert changed_entries(sums(original, deltas), values_of(module)) == {}
    other.join(timeout=60)
    assert changed_entries(original, values_of(module)) == {}


TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, **TOKENS}
T5_SHAPE = {"d_model": 32, "d_kv": 16, "d_ff": 96, "num_heads": 2, "decoder_start_token_id": 0, **TOKENS}
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


def run(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **inputs).logits


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_threads_in_the_first_forward_passes_compute_what_one_computes(kind, count):
    """After loading, after `eval()` and after another adapter was made active."""
    model = adapted(kind)
    original = base_values(model)
    for names in (["default", "other"], ["other"], ["default", "other"]):
        twin = copy.deepcopy(model)
        twin.base_model.set_adapter(names)
        expected = run(twin)
        model.base_model.set_adapter(names)
        for _ in range(2):
            for found in in_threads(count, lambda: [run(model) for _ in range(3)]):
                assert all(torch.equal(logits, expected) for logits in found)
            assert changed_entries(original, base_values(model))  # else the rest would show nothing
            model.eval()
        model.base_model.release()
        assert changed_entries(original, base_values(model)) == {}


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_threads_write_once_after_eval_and_then_only_read(kind):
    model = adapted(kind)
    original = base_values(model)
    run(model)
    held = changed_entries(original, base_values(model)).keys()
    before = versions_of(model)
    model.train().eval()
    in_threads(4, lambda: [run(model) for _ in range(3)])
    written = {name: versions_of(model)[name] - version for name, version in before.items()}
    assert {name: number for name, number in written.items() if number} == dict.fromkeys(held, 1)
