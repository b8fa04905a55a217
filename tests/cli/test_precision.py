"""Precision by device, with devices that this machine need not have."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from fnsft_trl.cli import fine_tuning, precision
from fnsft_trl.cli.options.parse import parse_options as training_options_of
from fnsft_trl.cli.precision import Precision, check_quantization
from fnsft_trl.errors import FNSFTError


@pytest.fixture
def device(monkeypatch):
    """Makes this process believe that it has an accelerator of some type."""

    def pretend(kind, bfloat16=True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type=kind))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        module = SimpleNamespace(is_bf16_supported=lambda: bfloat16)
        monkeypatch.setattr(torch, "get_device_module", lambda name: module if name != "hpu" else SimpleNamespace())
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    return pretend


@pytest.mark.parametrize(
    ("kind", "bfloat16", "mixed"),
    [
        ("cuda", True, "bf16"),
        ("cuda", False, "fp16"),
        ("xpu", True, "bf16"),
        ("xpu", False, "fp16"),
        ("npu", True, "bf16"),
        ("npu", False, "fp16"),
        ("hpu", True, "bf16"),
        ("mps", True, "no"),
        ("cpu", True, "no"),
    ],
)
def test_the_device_decides_when_nothing_is_given(device, kind, bfloat16, mixed):
    device(kind, bfloat16)
    found = Precision.choose()
    assert (found.device, found.mixed) == (kind, mixed)
    assert found.training_arguments.get("use_cpu", False) == (kind == "cpu")
    frozen = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[mixed]
    assert (found.dtype(frozen=True), found.dtype(frozen=False)) == (frozen, "float32")


@pytest.mark.parametrize(
    ("given", "mixed"),
    [
        ({"bf16": True}, "bf16"),
        ({"fp16": True}, "fp16"),
        ({"fp16": True, "bf16": False}, "fp16"),
        ({"bf16": False}, "no"),
        ({"fp16": False}, "bf16"),
        ({"bf16": False, "fp16": False}, "no"),
    ],
    ids=str,
)
def test_what_is_given_holds(device, given, mixed):
    device("cuda")
    assert Precision.choose(**given).mixed == mixed


def test_a_cpu_can_be_asked_for(device, monkeypatch):
    device("cuda")
    assert Precision.choose(use_cpu=True) == Precision("cpu", "no")
    assert Precision.choose(use_cpu=True, bf16=True) == Precision("cpu", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert Precision.choose() == Precision("cpu", "no")
    with pytest.raises(FNSFTError, match="fp16 is not a mixed precision of CPUs"):
        Precision.choose(fp16=True)


def test_quantisation_needs_bitsandbytes_and_a_device_that_it_supports(monkeypatch):
    for kind in ("cpu", "cuda"):
        check_quantization("load_in_4bit", kind)
    with pytest.raises(FNSFTError, match=r"load_in_8bit: bitsandbytes holds no quantised weights on neuron"):
        check_quantization("load_in_8bit", "neuron")
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(FNSFTError, match="on mps"):
        check_quantization("load_in_4bit", "mps")
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(FNSFTError, match="needs bitsandbytes; run: python -m pip install"):
        check_quantization("load_in_4bit", "cuda")


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        (["--use_peft"], "cuda", "bfloat16"),
        (["--use_peft", "--load_in_4bit"], "cuda", "bfloat16"),
        (["--use_peft", "--dtype", "auto"], "cuda", "auto"),
        (["--use_peft", "--dtype", "float32"], "cuda", "float32"),
        ([], "cuda", "float32"),
        (["--use_peft", "--bf16"], "cpu", "float32"),
    ],
)
def test_a_frozen_base_is_loaded_in_what_suits_the_device(device, monkeypatch, tmp_path, given, kind, expected):
    monkeypatch.setattr(Precision, "training_arguments", property(lambda self: {"use_cpu": True, "bf16": False}))
    monkeypatch.setattr(Precision, "choose", classmethod(lambda cls, **_: cls(kind, "bf16")))
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), *given]
    settings = fine_tuning._settings(training_options_of(argv))
    assert settings.model_init_kwargs["dtype"] == expected
    if "--load_in_4bit" in given:
        assert settings.quantization.bnb_4bit_compute_dtype == torch.bfloat16
