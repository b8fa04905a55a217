"""Where neurons are in parameters, for parameters of every form."""

from contextlib import contextmanager
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnsft_trl import FNSFTError
from fnsft_trl.neurons.layout import NeuronLayout, WeightSlice, whole_values, write_positions


@st.composite
def slices_of_parameters(draw):
    """A parameter of distinct entries, and where the neurons of a site are in it."""
    units, first = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    offsets, step = draw(st.sampled_from([((0,), 1), ((0, units), 1), ((0, 1), 2)]))  # plain, side by side, in turns
    per_expert = units * len(offsets)
    if draw(st.booleans()):
        experts, dims = draw(st.integers(1, 4)), draw(st.sampled_from([(0, 1), (0, 2)]))
        other = draw(st.integers(1, 3))
        shape = (experts, per_expert, other) if dims == (0, 1) else (experts, other, per_expert)
    else:
        experts, dims = 1, (draw(st.sampled_from([0, 1])),)
        other = draw(st.integers(1, 3))
        shape = (per_expert, other) if dims == (0,) else (other, per_expert)
        if dims == (0,) and draw(st.booleans()):
            shape = (per_expert,)  # a bias
    part = WeightSlice("mlp", "weight", dims, offsets, "output", experts * units, units, first, step)
    return part, torch.arange(prod(shape), dtype=torch.float32).reshape(shape)


def some_neurons(part):
    """Numbers of neurons of the site, with those in other parameters on either side among them."""
    return st.sets(st.integers(0, part.first + part.count + 2)).map(lambda n: torch.tensor(sorted(n)).long())


drawn = slices_of_parameters().flatmap(lambda s: st.tuples(st.just(s[0]), st.just(s[1]), some_neurons(s[0])))


@given(drawn)
def test_every_neuron_has_positions_of_its_own_and_together_they_are_all(example):
    part, parameter, _ = example
    everyone = torch.arange(part.first, part.first + part.count)
    positions = part.indices(everyone)
    assert sorted(positions.tolist()) == list(range(prod(parameter.shape[dim] for dim in part.dims)))
    assert part.mask(everyone, parameter).all()


@given(drawn)
def test_positions_are_those_of_each_neuron_alone(example):
    part, _, neurons = example
    alone = [part.indices(neuron[None]) for neuron in part.among(neurons)]
    assert all(len(positions) == len(part.offsets) for positions in alone)
    expected = torch.stack(alone, 1).flatten() if alone else torch.empty(0)
    assert part.indices(neurons).tolist() == expected.tolist()


@given(drawn)
def test_a_neuron_is_where_its_expert_and_unit_are(example):
    part, parameter, _ = example
    for neuron in range(part.count):
        expert, unit = divmod(neuron, part.units)
        mask = part.mask(torch.tensor([part.first + neuron]), parameter)
        along = mask.any(-1) if part.dims == (0, 1) else mask
        along = along.reshape(-1, part.units * len(part.offsets))  # (experts, positions of one)
        found = [(e, position) for e, position in along.nonzero().tolist()]
        assert found == sorted((expert, unit * part.step + offset) for offset in part.offsets)


@given(drawn)
def test_the_mask_and_the_selected_entries_are_the_same(example):
    part, parameter, neurons = example
    selected = part.select(parameter, part.indices(neurons))
    masked = parameter[part.mask(neurons, parameter).expand_as(parameter)]
    assert sorted(selected.flatten().tolist()) == masked.sort().values.tolist()
    if len(part.indices(neurons)):
        selected.fill_(-1)  # a copy
    assert (parameter >= 0).all()


@given(drawn)
def test_what_is_selected_can_be_written_back(example):
    part, parameter, neurons = example
    positions = part.indices(neurons)
    entries = part.select(parameter, positions)
    changed = parameter.clone()
    write_positions(changed, part.dims, positions, entries + 1000)
    mask = part.mask(neurons, parameter).expand_as(parameter)
    assert torch.equal(changed, torch.where(mask, parameter + 1000, parameter))
    write_positions(changed, part.dims, positions, entries)
    assert torch.equal(changed, parameter)


@given(drawn)
def test_touched_is_the_inverse_of_mask(example):
    part, parameter, neurons = example
    entries = part.mask(neurons, parameter).expand_as(parameter)
    assert part.touched(entries).tolist() == part.among(neurons).tolist()


@given(drawn, st.data())
def test_any_one_entry_touches_its_neuron(example, data):
    part, parameter, _ = example
    entry = data.draw(st.integers(0, parameter.numel() - 1))
    (neuron,) = part.touched(parameter == entry)
    assert part.mask(neuron[None], parameter).expand_as(parameter).flatten()[entry]


def test_one_dimension_is_asked_for_only_where_there_is_one():
    plain = WeightSlice("mlp.up", "weight", (1,), (0,), "output", 4, 4)
    experts = WeightSlice("mlp.experts", "gate_up_proj", (0, 1), (0, 2), "output", 4, 2)
    assert (plain.dim, plain.full_name) == (1, "mlp.up.weight")
    with pytest.raises(FNSFTError, match=r"mlp\.experts\.gate_up_proj holds all experts"):
        _ = experts.dim


def test_a_layout_names_its_modules_once():
    parts = [WeightSlice(name, "weight", (0,), (0,), "output", 4, 4) for name in ("up", "gate", "up", "down")]
    assert NeuronLayout(4, tuple(parts)).modules() == ["up", "gate", "down"]


def test_the_values_of_a_weight_that_zero3_has_sharded_are_gathered_and_copied(monkeypatch):
    parameter, values = torch.nn.Parameter(torch.empty(0)), torch.arange(6.0).view(2, 3)
    parameter.ds_id = 0

    @contextmanager
    def gathered(parameters):
        (parameter,) = parameters
        parameter.data = values
        yield
        parameter.data = torch.empty(0)

    monkeypatch.setattr("fnsft_trl.neurons.layout.gathered", gathered)
    found = whole_values(parameter)
    values.zero_()  # its memory is used again
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parameter.numel() == 0
