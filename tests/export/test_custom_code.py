"""Models that bring code of their own: every form of export, when that code is allowed to run, and not otherwise."""

import json
from pathlib import Path

import pytest
from helpers import tiny_model, tiny_tokenizer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fnsft_trl import FNSFTError, NeuronMask, NeuronTunerConfig, find_neuron_sites
from fnsft_trl.export import to_baked, to_merged, to_plain_lora, to_smaller


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_code"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
FORMS = {"merged": to_merged, "lora": to_plain_lora, "baked": to_baked, "smaller": to_smaller}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Neuron deltas of a tiny Llama under names of its own."""
    root = tmp_path_factory.mktemp("custom")
    tiny_model("llama").save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    (root / "base" / "own.py").write_text(CODE)
    file = root / "base" / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    about = {"model_type": "own_code", "architectures": ["OwnForCausalLM"], "auto_map": own}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    base = AutoModelForCausalLM.from_pretrained(root / "base", trust_remote_code=True)
    tuned = get_peft_model(base, NeuronTunerConfig(neurons={"0": "1-3"}, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "neuron_delta_" in name:
            parameter.data.fill_(0.5)
    tuned.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_export_runs_the_code_of_a_model_when_it_may(form, adapter, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", trust_remote_code=True)
    widths = {site.layer: site.width for site in find_neuron_sites(base)}
    mask = [NeuronMask.from_ranges({"1": "0-9"}, widths, "mlp_intermediate")] if form in ("baked", "smaller") else []
    with pytest.raises(FNSFTError, match="trust_remote_code"):
        FORMS[form](adapter, tmp_path / "out", *mask)
    assert not (tmp_path / "out").exists()
    FORMS[form](adapter, tmp_path / "out", *mask, trust_remote_code=True)
    if form != "lora":
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["architectures"] == ["OwnForCausalLM"]
        assert (tmp_path / "out" / "own.py").read_text() == CODE
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == (
            "OwnForCausalLM"
        )
