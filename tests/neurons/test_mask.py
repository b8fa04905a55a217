"""NeuronMask: an algebra of sets."""

import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from fnsft_trl import FNSFTError, NeuronMask, find_neuron_sites
from fnsft_trl.neurons.mask import fitting_sites


def mask(*layers):
    return NeuronMask({i: torch.tensor(members, dtype=torch.bool) for i, members in enumerate(layers)})


def test_set_operations():
    a, b = mask([1, 1, 0, 0], [0, 0, 0, 1]), mask([1, 0, 1, 0], [0, 0, 0, 1])
    assert a | b == mask([1, 1, 1, 0], [0, 0, 0, 1])
    assert a & b == mask([1, 0, 0, 0], [0, 0, 0, 1])
    assert ~a == mask([0, 0, 1, 1], [1, 1, 1, 0])
    assert (a.count, a.fraction) == (3, 3 / 8)
    assert a != b
    assert a.sha256 != b.sha256
    assert {a, mask([1, 1, 0, 0], [0, 0, 0, 1])} == {a}


def test_masks_of_other_shapes_or_sites_do_not_combine():
    with pytest.raises(FNSFTError, match="do not combine"):
        mask([1, 0]) | mask([1, 0, 0])
    with pytest.raises(FNSFTError, match="do not combine"):
        mask([1, 0]) & NeuronMask({0: torch.ones(2, dtype=torch.bool)}, "mlp_output")
    with pytest.raises(FNSFTError, match="bool tensor"):
        NeuronMask({0: torch.ones(2)})


def test_ranges_give_the_mask_back():
    original = mask([1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1])
    assert original.to_ranges() == {"0": "0-2,4", "2": "4"}
    assert NeuronMask.from_ranges(original.to_ranges(), {0: 5, 1: 5, 2: 5}, original.site) == original
    with pytest.raises(FNSFTError, match="layer 7"):
        NeuronMask.from_ranges({"7": "0"}, {0: 5}, original.site)
    with pytest.raises(FNSFTError, match="neuron specification"):
        NeuronMask.from_ranges({"0": "5"}, {0: 5}, original.site)


@st.composite
def masks(draw, count):
    """Masks over the same layers; layers need not be neighbours, nor in order, nor of one width."""
    widths = draw(st.dictionaries(st.integers(0, 12), st.integers(1, 9), min_size=1, max_size=4))
    site = draw(st.sampled_from(["mlp_intermediate", "mlp_output"]))
    return [
        NeuronMask({layer: torch.tensor(draw(members(width))) for layer, width in widths.items()}, site)
        for _ in range(count)
    ]


def members(width):
    return st.lists(st.booleans(), min_size=width, max_size=width)


def widths(mask):
    return {layer: len(members) for layer, members in mask.layers.items()}


@given(masks(3))
def test_masks_are_a_boolean_algebra(drawn):
    a, b, c = drawn
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert ~~a == a
    assert a & (b | c) == (a & b) | (a & c)
    assert (a | b, a & b) == (b | a, b & a)
    assert (a | a & b, a & (a | b)) == (a, a)
    assert ((a & ~a).count, (a | ~a).fraction) == (0, 1)


@given(masks(2))
def test_sizes_add_up(drawn):
    a, b = drawn
    assert (a | b).count + (a & b).count == a.count + b.count
    assert a.count + (~a).count == sum(widths(a).values())
    assert a.fraction + (~a).fraction == pytest.approx(1)
    assert a.count == sum(len(a.indices(layer)) for layer in a.layers)


@given(masks(1))
def test_any_mask_comes_back_from_its_ranges(drawn):
    (mask,) = drawn
    assert NeuronMask.from_ranges(mask.to_ranges(), widths(mask), mask.site) == mask


@given(masks(2))
def test_hashes_are_equal_exactly_where_masks_are(drawn):
    a, b = drawn
    equal = all(torch.equal(a.layers[layer], b.layers[layer]) for layer in a.layers)
    assert (a.sha256 == b.sha256) == (a == b) == equal
    turned = NeuronMask(dict(reversed(a.layers.items())), a.site)
    assert (turned.sha256, hash(turned)) == (a.sha256, hash(a))
    other = "mlp_output" if a.site == "mlp_intermediate" else "mlp_intermediate"
    assert NeuronMask(a.layers, other) != a


@given(masks(1), st.dictionaries(st.integers(13, 16), st.integers(1, 9), max_size=2))
def test_over_more_layers_has_the_same_members(drawn, more):
    (mask,) = drawn
    wider = mask.over(widths(mask) | more)
    assert widths(wider) == widths(mask) | more
    assert wider.to_ranges() == mask.to_ranges()
    assert mask.over(widths(mask)) == mask
    assert wider.count == mask.count


def test_a_mask_of_another_model_is_refused_whatever_layer_shows_it(family):
    model = tiny_model(family)
    sites = find_neuron_sites(model)
    fitting = NeuronMask({site.layer: torch.ones(site.width, dtype=torch.bool) for site in sites})
    assert [site.name for site in fitting_sites(model, fitting)] == [site.name for site in sites]
    part = NeuronMask({sites[1].layer: fitting.layers[sites[1].layer]})
    assert len(fitting_sites(model, part)) == len(sites)
    for layer, width in ((sites[-1].layer, 7), (99, 40)):
        with pytest.raises(FNSFTError, match=f"{width} neurons in layer {layer}"):
            fitting_sites(model, NeuronMask({**fitting.layers, layer: torch.ones(width, dtype=torch.bool)}))
