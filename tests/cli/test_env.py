"""`fnsft env`: what a report of a fault holds, and what it must not hold."""

import platform
import re
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from helpers import write_converter
from hub import ALICE, BOB, save_login

import fnsft_trl
from fnsft_trl.cli import main
from fnsft_trl.export.gguf import CONVERTER_VARIABLE


@pytest.fixture
def shown(capsys):
    def show() -> dict[str, str]:
        assert main(["env"]) == 0
        text = capsys.readouterr().out
        assert not any(secret in text for secret in (ALICE, BOB))
        lines = [re.fullmatch(r"- ([^:]+): (.+)", line) for line in text.splitlines()]
        return {line[1]: line[2] for line in lines}

    return show


def test_versions_are_those_that_are_installed(shown, no_token):
    found = shown()
    assert (found["fnsft-trl"], found["Python"]) == (fnsft_trl.__version__, platform.python_version())
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "scikit-learn", "numpy"):
        assert found[package] == version(package)


def test_a_package_that_is_missing_is_said(shown, no_token, monkeypatch):
    monkeypatch.setattr("fnsft_trl.cli.env._PACKAGES", ("no-such-package",))
    assert shown()["no-such-package"] == "not installed"


def test_the_device_decides_precision_and_quantisation(shown, no_token, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found = shown()
    assert (found["accelerators"], found["device of training"], found["mixed precision"]) == ("none", "cpu", "no")
    assert found["quantised weights"] == "bitsandbytes, on cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cpu"})
    found = shown()
    assert found["accelerators"].startswith("2 of type cuda (Card 0, Card 1; CUDA")
    assert (found["device of training"], found["mixed precision"]) == ("cuda", "bf16")
    assert found["quantised weights"].startswith("none (4 and 8 bits: bitsandbytes holds no quantised weights on cuda")


@pytest.mark.posix
def test_the_converter_and_the_cache_are_named_without_the_user(shown, no_token, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("FNSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(CONVERTER_VARIABLE, raising=False)
    found = shown()
    assert (found["GGUF converter"], found["cache"]) == ("not found", "~/cache")
    write_converter(tmp_path / "converter")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "converter"))
    assert shown()["GGUF converter"] == "~/converter"


def test_the_token_is_named_by_its_place_and_the_hub_is_not_asked(shown, hub, no_token, monkeypatch):
    assert shown()["token of the Hub"] == "none"
    save_login(BOB)
    assert shown()["token of the Hub"].startswith("from the saved login (")
    (no_token / ".env").write_text(f"HF_TOKEN={BOB}\n")
    assert shown()["token of the Hub"] == "from HF_TOKEN in the file .env"
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert shown()["token of the Hub"] == "from HF_TOKEN in the environment"
    assert hub.requests == []
