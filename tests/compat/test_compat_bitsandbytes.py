"""The parts of bitsandbytes that have no public name are there, and do what is relied on."""

import importlib

import pytest
import torch
from torch import nn

from fnsft_trl.compat import bitsandbytes as compat


bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def layer():
    return bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")


@pytest.fixture
def momentum():
    """What an 8-bit optimizer keeps of a parameter after a step in which every other column has no gradient."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[:, 1::2] = 0
    optimizer = bnb.optim.AdamW8bit([parameter], lr=1e-3)
    optimizer.step()
    return optimizer.state[parameter]


@pytest.mark.parametrize("name", [compat.KERNEL_LOGGER, compat.CAST_LOGGER])
def test_bitsandbytes_has_the_logger(name):
    assert importlib.import_module(name).logger.name == name


def test_bitsandbytes_supported_devices_are_types_of_devices():
    assert {"cpu", "cuda"} <= compat.supported_devices()


def test_bitsandbytes_momentum_is_kept_in_8_bits_under_this_name(momentum):
    assert momentum[compat.MOMENTUM].dtype == torch.uint8
    assert momentum[compat.MOMENTUM].shape == (64, 128)


def test_bitsandbytes_zero_entry_is_what_stands_for_zero_in_the_momentum(momentum):
    assert momentum["qmap1"][compat.zero_entry(momentum)] == 0
    means = momentum["qmap1"][momentum[compat.MOMENTUM].int()] * momentum["absmax1"].repeat_interleave(256).view(
        64, 128
    )
    assert torch.allclose(means[:, ::2], torch.tensor(0.1))  # a tenth of the gradient
    assert torch.allclose(means[:, 1::2], torch.tensor(0.0), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "squares"),
    [("RMSprop", True), ("Adagrad", True), ("SGD", False), ("Lion", False), ("AdamW", False)],
)
@pytest.mark.parametrize("bits", ["8bit", "32bit"])
def test_bitsandbytes_keeps_only_squares_is_said_of_optimizers_with_no_momentum(name, squares, bits):
    """Their one running mean is as large after steps of changing sign as after steps of one."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(bnb.optim, f"{name}{bits}")([parameter], lr=1e-3, **options)
    assert compat.keeps_only_squares(optimizer) == squares
    means = []
    for sign in (-1, 1):
        parameter.grad = torch.full_like(parameter, 0.5 * sign)
        optimizer.step()
        state = optimizer.state[parameter]
        value = state[compat.MOMENTUM].flatten()
        means.append(float(state["qmap1"][value.int()][0] if bits == "8bit" else value[0]))
    assert (min(means) >= 0) == squares
    assert not compat.keeps_only_squares(torch.optim.RMSprop([parameter]))


def test_bitsandbytes_packs_weights_is_said_by_four_bit_layers_alone(layer):
    assert compat.packs_weights(layer)
    assert not compat.packs_weights(nn.Linear(2, 2))


def test_bitsandbytes_is_packed_is_said_of_a_packed_layer(layer):
    assert not compat.is_packed(layer)
    layer.weight.quant_state.packing_format_for_cpu = True
    assert compat.is_packed(layer)


def test_bitsandbytes_keep_unpacked_is_what_the_forward_pass_asks_for(layer, monkeypatch):
    class Packed(Exception):
        pass

    def pack(*args):
        raise Packed

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", pack)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    layer.support_avx512bf16_for_cpu = True  # as a CPU that has it sets it
    with pytest.raises(Packed):
        layer.eval()(x)
    compat.keep_unpacked(layer)
    assert layer(x).shape == (1, 32)
