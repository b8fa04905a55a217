"""One repository with all that was trained: model, adapter, networks and GGUF file, with one card."""

import json

import pytest
import torch
from helpers import VOCABULARY, logits, write_converter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fnsft_trl import FunctionalNetworkTemplate
from fnsft_trl.cli import main
from fnsft_trl.export.gguf import CONVERTER_VARIABLE


pytestmark = pytest.mark.slow

IDS = torch.arange(3, 21).view(2, 9) % VOCABULARY


@pytest.fixture
def converter(tmp_path, monkeypatch):
    write_converter(tmp_path / "convert")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "convert"))


@pytest.mark.parametrize("way", ["neuron_delta", "lora"])
def test_one_command_pushes_all_and_each_part_loads_from_there(way, trained, converter, hub, tmp_path):
    name, out = f"alice/all-{way}", tmp_path / "out"
    words = ["export", str(trained / way), "--to", "merged", "--output_dir", str(out), "--include", "adapter", "gguf"]
    assert main([*words, "--push_to_hub", name]) == 0
    merged = AutoModelForCausalLM.from_pretrained(name).eval()
    base = AutoModelForCausalLM.from_pretrained(trained / "base")
    adapted = PeftModel.from_pretrained(base, name, subfolder="adapter").eval()
    assert torch.allclose(logits(merged, IDS), logits(adapted, IDS), atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(merged, IDS), logits(adapted, IDS), atol=1e-4)
    assert FunctionalNetworkTemplate.from_pretrained(name).components
    assert json.loads((out / "model.gguf").read_text())["arguments"][-1] == "auto"
    card = (out / "README.md").read_text()
    for part in ("`adapter/`", "`functional_networks/`", "`model.gguf`", "## Functional networks"):
        assert card.count(part) >= 1, part
    assert ("import fnsft_trl.tuner" in card) == (way == "neuron_delta")


def test_an_export_over_one_with_more_leaves_nothing_of_it(trained, converter, tmp_path):
    words = ["export", str(trained / "lora"), "--to", "merged", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--include", "adapter", "gguf"]) == 0
    assert main(words) == 0
    assert not (tmp_path / "out" / "model.gguf").exists()
    assert not (tmp_path / "out" / "adapter").exists()
    assert "What is here" not in (tmp_path / "out" / "README.md").read_text()
