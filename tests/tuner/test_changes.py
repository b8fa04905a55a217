"""Deltas that are small beside their weights: what they change, and that they train, in every precision and form."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import random_mask
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.neurons.sites import SITES
from fnsft_trl.tuner import ExpertDeltaLayer
from fnsft_trl.tuner.changes import Change, add_changes, held_linear, summed_linear
from fnsft_trl.tuner.held import HeldWeights


HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIDES = ["output", "input"]


def random_map(n_in, n_out, has_bias, seed=0):
    """Weight, bias and a way to draw more, in float32."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=draw) / n_in**0.5
    return weight, torch.randn(n_out, generator=draw) * 0.5 if has_bias else None, draw


def random_change(weight, side, has_bias, scale, draw):
    n_out, n_in = weight.shape
    positions = torch.randperm(n_out if side == "output" else n_in, generator=draw)[: max(1, n_out // 3)]
    values = torch.randn(len(positions), n_in if side == "output" else n_out, generator=draw) * scale / n_in**0.5
    bias = torch.randn(len(positions), generator=draw) * scale if has_bias and side == "output" else None
    return Change(side, positions, values, bias)


def exact(x, changes, weight, bias, *, magnitude=False):
    """The map with its changes in float64; or the sum of what is added up there, without signs."""
    sized = torch.abs if magnitude else torch.clone
    rows, result = sized(x.double()), 0
    result = linear(rows, sized(weight.double()), None if bias is None else sized(bias.double()))
    for side, positions, values, added in changes:
        values = sized(values.double())
        if side == "output":
            change = linear(rows, values, None if added is None else sized(added.double()))
            result = result.index_add(-1, positions, change)
        else:
            result = result + rows.index_select(-1, positions) @ values
    return result


@given(
    shape=st.tuples(*(st.integers(1, 40) for _ in range(3))),
    sides=st.lists(st.sampled_from(SIDES), min_size=1, max_size=3),
    has_bias=st.booleans(),
    scale=st.sampled_from([0, 1e-5, 1e-3, 1e-1, 10]),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALF.values()]),
    is_autocast=st.booleans(),
)
def test_every_form_is_the_map_with_its_changes_to_rounding_of_the_output(
    shape, sides, has_bias, scale, dtype, is_autocast
):
    tokens, n_in, n_out = shape
    weight, bias, draw = random_map(n_in, n_out, has_bias)
    changes = [random_change(weight, side, has_bias, scale, draw) for side in sides]
    x, weight, bias = torch.randn(tokens, n_in, generator=draw).to(dtype), weight.to(dtype), bias
    bias = None if bias is None else bias.to(dtype)
    is_autocast &= dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast), torch.no_grad():
        found = [
            summed_linear(x, changes, weight=weight, bias=bias),
            add_changes(linear(x, weight, bias), x, changes),
        ]
    precision = torch.finfo(torch.bfloat16 if is_autocast else dtype).eps
    if precision < 1e-6:
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        found.append(
            held_linear(
                x,
                changes,
                held=HeldWeights(layer),
                compute=lambda inputs: linear(inputs, layer.weight, layer.bias),
                weight=layer.weight,
                bias=layer.bias,
            )
        )
    if is_autocast:
        x, weight = x.bfloat16(), weight.bfloat16()
    expected = exact(x, changes, weight, bias)
    allowed = 3 * precision * exact(x, changes, weight, bias, magnitude=True) + torch.finfo(dtype).tiny
    for result in found:
        assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_a_change_below_half_a_rounding_step_of_the_output_counts_on_average(side, has_bias, dtype):
    """Single outputs are rounded; over many, the changes must not be lost."""
    weight, bias, draw = random_map(256, 256, has_bias)
    change = random_change(weight, side, has_bias, torch.finfo(HALF[dtype]).eps / 10, draw)
    x, weight = torch.randn(2048, 256, generator=draw).to(HALF[dtype]), weight.to(HALF[dtype])
    bias = None if bias is None else bias.to(HALF[dtype])
    without = exact(x, [], weight, bias)
    expected = exact(x, [change], weight, bias) - without
    found = summed_linear(x, [change], weight=weight, bias=bias).double() - without
    share = float((found * expected).sum() / expected.square().sum())
    assert 0.9 < share < 1.1
    rounded = (weight.double() + _written(change, weight)).to(weight.dtype)  # what a merged weight holds
    if change.bias is None:
        lost = exact(x, [], rounded, bias) - without
        assert float((lost * expected).sum() / expected.square().sum()) < 0.9


def _written(change, weight):
    """A change as a matrix of the weight's shape."""
    zeros = torch.zeros_like(weight, dtype=torch.float64)
    dim = 0 if change.side == "output" else 1
    return zeros.index_copy(dim, change.positions, change.values.double().movedim(0, dim))


# Whole models

IDS = torch.randint(3, 120, (48, 32), generator=torch.Generator().manual_seed(1))
# name -> (dtype of the base, dtype that autocast goes to)
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
}


def llama(has_bias=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=120, mlp_bias=has_bias, **shape))


def wrap(site, dtype):
    base = llama()
    mask = random_mask(base, site, share=0.1)
    return get_peft_model(base.to(dtype), NeuronTunerConfig(neurons=mask.to_ranges(), site=site))


def deltas_of(model):
    return {name: p for name, p in model.named_parameters() if "neuron_delta" in name}


def loss_of(model, autocast=None):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(input_ids=IDS).logits
    return cross_entropy(logits[:, :-1].reshape(-1, 120).double(), IDS[:, 1:].reshape(-1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("site", SITES)
def test_a_step_that_a_weight_would_round_away_lowers_the_loss_as_in_float32(site, precision, training):
    """A first step of Adam at 3e-5: what is learnt is the sign of the gradient."""
    dtype, autocast = PRECISIONS[precision]
    reference = wrap(site, torch.float32)
    loss_of(reference).backward()
    step = {name: -3e-5 * p.grad.sign() for name, p in deltas_of(reference).items()}

    @torch.no_grad()
    def gain(model, autocast=None):
        before = loss_of(model, autocast)
        for name, delta in deltas_of(model).items():
            delta.copy_(step[name])
        return float(before - loss_of(model, autocast))

    expected = gain(reference)
    assert expected > 0
    assert gain(wrap(site, dtype).train(training), autocast) == pytest.approx(expected, rel=0.25)  # the rest is noise


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_at_a_small_rate_moves_the_loss_as_in_float32(precision):
    dtype, autocast = PRECISIONS[precision]
    gains = []
    for model, to in ((wrap(SITES[0], torch.float32), None), (wrap(SITES[0], dtype), autocast)):
        model.train()
        optimizer = torch.optim.AdamW(deltas_of(model).values(), lr=1e-5, weight_decay=0)
        losses = []
        for _ in range(8):
            loss = loss_of(model, to)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert {delta.dtype for delta in deltas_of(model).values()} == {torch.float32}
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 0
    assert gains[1] == pytest.approx(gains[0], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluated_trained_and_compiled_it_is_one_function(precision):
    dtype, autocast = PRECISIONS[precision]
    model = wrap(SITES[0], dtype)
    with torch.no_grad():
        for delta in deltas_of(model).values():
            delta.normal_(0, 1e-3)
    found = []
    for training in (True, False):
        for run in (model.train(training), torch.compile(model, backend="aot_eager")):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
                found.append(run(input_ids=IDS).logits.float())
    # Between half precisions a rounding step more or less, here and there, on the way.
    tolerance = 1e-5 if precision == "float32" else 0.02
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=tolerance, rtol=0)
    torch.compiler.reset()


EXPERTS = [a for a in ARCHITECTURES if not a.dense]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", EXPERTS, ids=str)
def test_small_deltas_of_experts_count_in_half_precision(architecture, site, dtype, training):
    """A layer by itself, with given experts: in a whole model the smallest change sends tokens to other experts."""
    base = architecture.model().to(HALF[dtype])
    mask = random_mask(base, site)
    model = get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges(), site=site)).train(training)
    layer = next(module for module in model.modules() if isinstance(module, ExpertDeltaLayer))
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(2048, base.config.hidden_size, generator=draw).to(HALF[dtype])
    count = len(layer.base_layer.down_proj)
    chosen = torch.rand(2048, count, generator=draw).topk(2).indices
    weights = torch.full((2048, 2), 0.5, dtype=HALF[dtype])

    @torch.no_grad()
    def effect(layer, *inputs):
        found = []
        for scale in (0, 1):
            for name, delta in layer.named_parameters():
                if "neuron_delta" in name:
                    draw = torch.Generator().manual_seed(7)
                    step = torch.finfo(HALF[dtype]).eps / 10  # weights are about 0.2
                    delta.copy_(torch.randn(delta.shape, generator=draw) * scale * step)
            found.append(layer(*inputs).double())
        return found[1] - found[0]

    found = effect(layer, hidden, chosen, weights)
    expected = effect(copy.deepcopy(layer).float(), hidden.float(), chosen, weights.float())
    assert 0.85 < float((found * expected).sum() / expected.square().sum()) < 1.15
