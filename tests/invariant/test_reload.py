"""Every artefact, reloaded in a fresh process, gives the logits it was saved with (invariant 5)."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from helpers import FAMILIES, sft_config, tiny_model
from peft import LoraConfig
from safetensors.torch import save_file

from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate, select_neurons


RELOAD = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import fnsft_trl.tuner
from fnsft_trl import FunctionalNetworkTemplate, select_neurons

root = Path(sys.argv[1])
expected = load_file(root / "expected.safetensors")
results = {}
for name in expected:
    if name == "ids":
        continue
    family, kind = name.split(".")
    base = root / family / "base"
    if kind == "full" or kind.endswith("merged"):
        model = AutoModelForCausalLM.from_pretrained(root / family / kind)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), root / family / kind)
    with torch.no_grad():
        logits = model.eval()(expected["ids"]).logits
    results[name] = float((logits - expected[name]).abs().max())
for family in {name.split(".")[0] for name in expected if name != "ids"}:
    template = FunctionalNetworkTemplate.from_pretrained(root / family / "full" / "functional_networks")
    results[family + ".mask"] = select_neurons(template, [0]).sha256
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, templates, rows, tokenizer):
    root = tmp_path_factory.mktemp("artefacts")
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = {"ids": ids}
    for family in FAMILIES:
        tiny_model(family).save_pretrained(root / family / "base")
        for method in ("neuron_delta", "lora", "full"):
            directory = root / family / method
            trainer = FNSFTTrainer(
                model=tiny_model(family),
                args=sft_config(directory),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4) if method == "lora" else None,
                network_config=FunctionalNetworkConfig(train_method=method, ica_component_ids=[0]),
                network_template=templates[family],
            )
            trainer.train()
            trainer.save_model()
            with torch.no_grad():
                expected[f"{family}.{method}"] = trainer.model.eval()(ids).logits.clone()
            if method != "full":
                expected[f"{family}.{method}_merged"] = expected[f"{family}.{method}"].clone()
                trainer.model.merge_and_unload().save_pretrained(root / family / f"{method}_merged")
    save_file(expected, root / "expected.safetensors")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_saved_model_reloads_with_equal_logits(family, method, reloaded):
    assert reloaded[1][f"{family}.{method}"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_merged_model_reloads_within_1e5(family, method, reloaded):
    assert reloaded[1][f"{family}.{method}_merged"] < 1e-5


def test_saved_template_reloads_with_the_same_networks(family, reloaded):
    root, results = reloaded
    template = FunctionalNetworkTemplate.from_pretrained(root / family / "full" / "functional_networks")
    assert results[f"{family}.mask"] == select_neurons(template, [0]).sha256
