"""The parts of accelerate that have no public name are there, and do what is relied on."""

import inspect

from accelerate import Accelerator, state
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from fnsft_trl.compat import accelerate as compat


def test_accelerate_parse_flag_from_env_reads_a_switch(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert compat.parse_flag_from_env("ACCELERATE_USE_CPU") is False
    for text, value in (("true", True), ("1", True), ("false", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", text)
        assert compat.parse_flag_from_env("ACCELERATE_USE_CPU") is value


def test_accelerate_use_cpu_is_the_variable_that_it_reads():
    assert 'parse_flag_from_env("ACCELERATE_USE_CPU")' in inspect.getsource(state)


def test_accelerate_tells_fsdp2_from_fsdp1():
    assert Accelerator(cpu=True).is_fsdp2 is False


def test_accelerate_moves_inputs_by_a_forward_that_it_sets_on_a_module():
    module = nn.Linear(2, 2)
    assert not compat.moves_inputs(module)
    add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert compat.moves_inputs(module)
    assert "forward" in vars(module)
    remove_hook_from_module(module)
    assert not compat.moves_inputs(module)
