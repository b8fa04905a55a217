"""Weights that deltas are merged into: what they hold and get back, copies, interruptions, and others who write."""

import contextlib
import copy
import pickle

import pytest
import torch
from helpers import changed_entries
from torch import nn

from fnsft_trl import FNSFTError
from fnsft_trl.neurons import WeightSlice
from fnsft_trl.neurons.layout import write_positions
from fnsft_trl.tuner.merged import Delta, MergedWeights


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [("one",), ("three",), ("one", "three"), ("three", "one")])
def test_base_plus_deltas_are_there_until_they_are_taken_out(adapters, dtype):
    module = Module(dtype)
    original, deltas = values_of(module), deltas_of(module, *adapters)
    expected = sums(original, deltas)
    assert changed_entries(original, expected).keys() == SLICES.keys()
    merged = MergedWeights(module)
    merged.merge(deltas)
    assert changed_entries(expected, values_of(module)) == {}
    merged.merge({})
    assert changed_entries(original, values_of(module)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_follows_from_what_is_asked_for_alone(dtype):
    """One after the other, together, and the other way round."""
    module = Module(dtype)
    original, merged, both = values_of(module), MergedWeights(module), deltas_of(module, "one", "three")
    for names in (("one",), ("one", "three"), ("three",), ("three", "one"), (), ("three",), ()):
        wanted = {name: both[name] for name in names}
        merged.merge(wanted)
        assert changed_entries(sums(original, wanted), values_of(module)) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", ["_take", "_put", "_sums"])
@pytest.mark.parametrize("at", range(2 * len(SLICES)))
@pytest.mark.parametrize(
    ("before", "after"), [((), ("one",)), (("one",), ()), (("one",), ("three",)), (("one",), ("three", "one"))]
)
def test_an_interruption_leaves_the_base_values_within_reach(before, after, at, method, error, monkeypatch):
    """A key pressed, or no memory left, in the middle of writing."""
    module = Module()
    original, merged, deltas = values_of(module), MergedWeights(module), deltas_of(module, "one", "three")
    merged.merge({name: deltas[name] for name in before})
    after = {name: deltas[name] for name in after}
    work, calls = getattr(MergedWeights, method), []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return work(self, *args)

    with monkeypatch.context() as patch, contextlib.suppress(error):
        patch.setattr(MergedWeights, method, interrupted)
        merged.merge(after)
    twin = copy.deepcopy(merged)
    merged.merge(after)
    assert not merged.is_torn
    assert changed_entries(sums(original, after), values_of(module)) == {}
    for one in (merged, twin):
        one.merge({})
        assert changed_entries(original, values_of(one.module)) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda merged: pickle.loads(pickle.dumps(merged))])
@pytest.mark.parametrize("adapters", [(), ("one",)])
def test_copies_are_merged_on_their_own(adapters, copied):
    module = Module()
    original, merged, deltas = values_of(module), MergedWeights(module), deltas_of(module, "one")
    merged.merge({name: deltas[name] for name in adapters})
    twin = copied(merged)
    assert changed_entries(values_of(module), values_of(twin.module)) == {}
    merged.merge(deltas)
    twin.merge({})
    assert changed_entries(original, values_of(twin.module)) == {}
    assert changed_entries(sums(original, deltas), values_of(module)) == {}


def test_base_values_follow_their_module_to_another_precision():
    module = Module()
    merged, deltas = MergedWeights(module), deltas_of(module, "one")
    expected = {name: values.double() for name, values in values_of(module).items()}
    merged.merge(deltas)
    merged.move(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, module.double)
    merged.merge({})
    assert changed_entries(expected, values_of(module)) == {}


def test_whether_what_is_merged_is_finite():
    module = Module()
    merged, deltas = MergedWeights(module), deltas_of(module, "one", "three")
    merged.merge(deltas)
    assert merged.is_finite()
    with torch.no_grad():
        deltas["three"][3].values[1, 2] = float("inf")
    merged.merge(deltas)
    assert not merged.is_finite()
    merged.merge({})


@torch.no_grad()
def written(module):
    for parameter in module.parameters():
        parameter.add_(1)


def written_without_a_trace(module):
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def replaced(module):
    for name, parameter in module.named_parameters():
        setattr(module, name, nn.Parameter(parameter.detach() * 2, requires_grad=False))


def loaded(module):
    module.load_state_dict(Module(module.rows.dtype).state_dict())


def cast(module):
    module.to(torch.float64)


CHANGES = [written, written_without_a_trace, replaced, loaded, cast]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", ["unmerge", "merge more", "move"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_write_is_not_undone_without_a_word(change, then, dtype):
    module = Module(dtype)
    merged, deltas = MergedWeights(module), deltas_of(module, "one", "three")
    merged.merge({"one": deltas["one"]})
    change(module)
    found = values_of(module)
    calls = {
        "unmerge": lambda: merged.merge({}),
        "merge more": lambda: merged.merge(deltas),
        "move": lambda: merged.move(torch.Tensor.double, module.double),
    }
    with pytest.raises(FNSFTError, match="were changed while neuron deltas were merged"):
        calls[then]()
    assert changed_entries(found, values_of(module)) == {}


def test_weights_that_were_sharded_while_they_had_deltas_are_an_error():
    module = Module()
    merged = MergedWeights(module)
    merged.merge(deltas_of(module, "one"))
    module._is_fsdp_managed_module = True  # as FSDP marks its modules
    with pytest.raises(FNSFTError, match="unmerge before loading, editing or sharding"):
        merged.merge({})


def test_deltas_may_change_while_they_are_merged():
    module = Module()
    original, merged, deltas = values_of(module), MergedWeights(module), deltas_of(module, "one")
    merged.merge(deltas)
    with torch.no_grad():
        deltas["one"][0].values.fill_(float("nan"))
    merged.merge({})
    assert changed_entries(original, values_of(module)) == {}
