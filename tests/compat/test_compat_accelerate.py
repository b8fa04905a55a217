"""The parts of accelerate that have no public name are there, and do what is relied on."""

import inspect

import pytest
import torch
from accelerate import Accelerator, cpu_offload, state
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from helpers import VOCABULARY, logits, random_mask, tiny_model, tiny_rows, tiny_tokenizer
from torch import nn

from fnsft_trl import EvaluationConfig, EvaluationData, ProbeData
from fnsft_trl.compat import accelerate as compat
from fnsft_trl.discovery.inputs import reached_linears
from fnsft_trl.evaluation.general import score_text
from fnsft_trl.evaluation.generation import generate_answers
from fnsft_trl.evaluation.reload import last_logits
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.series import RetentionSeries
from fnsft_trl.interventions import Zero
from fnsft_trl.probes.singles import first_order_effects
from fnsft_trl.probes.switch import Switch


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


IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
TOKENIZER = tiny_tokenizer()
TEXT = RetentionText.from_texts([row["prompt"] for row in tiny_rows(6)], TOKENIZER)


def series(model):
    found = RetentionSeries(TEXT)
    found.begin(model)
    return found.measure(model)


def effects(model):
    data = ProbeData.read(
        EvaluationData("text", tiny_rows(4)), TOKENIZER, EvaluationConfig(), max_tokens=50, max_length=32
    )
    found = first_order_effects(model, [data], site="mlp_intermediate", layers=[0, 1, 2], batch_size=2)
    return [found[layer].tolist() for layer in found]


def switched(model):
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    with Switch(model, "mlp_intermediate") as switch:
        switch.set(switch.prepared(mask, Zero()))
        return logits(model, IDS).tolist()


READERS = {
    "scores of tokens": TEXT.cross_entropy,
    "scores of a text": lambda model: score_text(model, TEXT)["cross_entropy"].value,
    "a series": series,
    "answers": lambda model: generate_answers(model, TOKENIZER, IDS.tolist(), max_new_tokens=4),
    "the check of a reload": lambda model: last_logits(model, IDS).tolist(),
    "first-order effects": effects,
    "a switch": switched,
    "modules that text reaches": lambda model: reached_linears(model, IDS[0].tolist()),
}


@pytest.mark.parametrize("reader", READERS)
def test_accelerate_input_device_lets_models_be_read_that_are_offloaded_whole(reader):
    whole, offloaded = tiny_model("llama"), cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in offloaded.parameters()} == {"meta"}
    assert compat.input_device(offloaded) == compat.input_device(whole) == torch.device("cpu")
    assert READERS[reader](offloaded) == READERS[reader](whole)
