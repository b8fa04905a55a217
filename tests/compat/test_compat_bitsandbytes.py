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
