"""DeepSpeed, two processes on a CPU: the weights of one process without it, or a refusal before anything is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TESTS, medium_experts, medium_model
from safetensors.torch import load_file


# Where `make install` puts it: libraries that find it beside them behave in other ways.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
CELLS = {f"zero{stage} {method}": method for stage in (2, 3) for method in ("neuron_delta", "lora")}
CELLS["zero2 neuron_delta experts"] = "neuron_delta experts"
REFUSED = {
    "full": "train_method=full does not run",
    "protect": "protect does not run",
    "kl_to_base": "kl_to_base does not run",
    "penalties": "ewc, lwf and olora do not run",
    "rollback": "retention_on_budget=rollback does not run",
    "DPO full": "train_method=full does not run",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEEPSPEED.is_dir(), reason=f"DeepSpeed is not in {DEEPSPEED}; make install puts it there"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all runs have left."""
    directory = tmp_path_factory.mktemp("deepspeed")
    paths = os.pathsep.join(map(str, (DEEPSPEED, TESTS, ROOT)))
    words = [sys.executable, TESTS / "deepspeed_run.py", directory]
    ended = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-8000:]
    return directory


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_train_as_one_does_without_deepspeed(folder, cell):
    """Weights, masked and unmasked losses, and retention; each run has gone on from its checkpoint to the same."""
    method = CELLS[cell]
    one = load_file(folder / f"{method}-0.safetensors")
    two = [load_file(folder / f"{cell}-{rank}.safetensors") for rank in (0, 1)]
    base = (medium_experts if method.endswith("experts") else medium_model)().state_dict()
    for found in two:
        assert found.keys() == one.keys()
        for name, value in one.items():
            # The loss that balances experts is of a batch, and batches are split.
            within = 1e-4 if name == "log.loss" and method.endswith("experts") else 1e-6
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=within, msg=lambda said, name=name: name + said
            )
    moved = 0
    for name, value in two[0].items():
        assert torch.equal(value, two[1][name]), name
        if "lora_" in name or "neuron_delta_" in name:
            moved += bool(value.any())
        elif name.startswith("base_model."):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain]), name
    assert moved > 0
    assert one["guarded"].min() > 0
    assert len(one["log.eval_masked_loss"]) == len(one["log.eval_unmasked_loss"]) == 1
    assert one["log.retention/text/kl"][-1] > 0


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_saved_is_whole_and_a_checkpoint_is_marked(folder, cell):
    saved = load_file(folder / cell / "adapter_model.safetensors")
    one = load_file(folder / CELLS[cell] / "adapter_model.safetensors")
    assert saved.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-6)
    checkpoint = folder / cell / "checkpoint-2"
    assert (checkpoint / "functional_networks" / "complete.json").is_file()
    assert (checkpoint / "global_step2").is_dir()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_run_is_refused_before_the_model_is_loaded(folder, stage, what):
    said = json.loads((folder / "refused.json").read_text())[f"zero{stage} {what}"]
    assert f"{REFUSED[what]} under DeepSpeed ZeRO-{stage}, " in said
    assert "\n" not in said


def test_zero3_reads_no_weights_to_discover_and_takes_no_experts(folder):
    said = json.loads((folder / "refused.json").read_text())
    assert "sharded; run fnsft discover first" in said["zero3 discovery"]
    assert "a mixture of experts does not run under DeepSpeed ZeRO-3" in said["zero3 neuron_delta experts"]
