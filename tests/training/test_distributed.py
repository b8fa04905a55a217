"""Two processes on a CPU (gloo): the same weights in each, frozen ones bit-identical, the result that of one."""

import json
import shlex

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, TESTS, assert_only_these_changed, medium_experts, medium_model, state
from processes import run_processes
from safetensors.torch import load_file

from fnsft_trl import NeuronMask, find_neuron_sites


SCRIPT = TESTS / "distributed_run.py"
RECIPES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "accelerate"])
def runs(request, tmp_path_factory):
    """The kind, and the folder in which one process, and two, have left their results."""
    root = tmp_path_factory.mktemp(request.param)
    for processes in (1, 2):
        folder = root / str(processes)
        folder.mkdir()
        run_processes(processes, SCRIPT, processes, request.param, folder)
    return request.param, root


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full", "neuron_delta experts", "lora experts"])
def test_two_processes_train_as_one_does(runs, method):
    kind, root = runs
    if kind != "ddp" and method == "lora experts":
        pytest.skip("refused; tested in test_expert_lora.py")
    one = load_file(root / "1" / f"{method}-0.safetensors")
    two = [load_file(root / "2" / f"{method}-{rank}.safetensors") for rank in (0, 1)]
    masks = [NeuronMask({i: w.pop(f"trainable.{i}") for i in range(2)}) for w in (one, *two)]
    assert masks[0] == masks[1] == masks[2]
    assert 0 < masks[0].fraction < 0.6
    retention = [w.pop("retention", None) for w in (one, *two)]
    if retention[0] is not None:  # a run of FNSFTTrainer: at its start and its end, each process has measured a part
        assert torch.equal(retention[1], retention[2])
        torch.testing.assert_close(retention[1], retention[0], rtol=0, atol=1e-6)
        assert (retention[0].shape, retention[0][1, 2] > 0) == ((2, 3), True)

    base = (medium_experts if method.endswith("experts") else medium_model)(torch.float64)
    before, sites = state(base), find_neuron_sites(base)
    for weights in (one, *two):
        assert_only_these_changed(before, weights, sites, masks[0])
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-6)
    if kind != "fsdp2":  # both have discovered the same, and only the main process writes
        first, second = ((root / "2" / f"{method}-template-{rank}") for rank in (0, 1))
        for file in ("config.json", "template.safetensors"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
        checkpoint = root / "2" / f"{method}-out-0" / "checkpoint-4" / "functional_networks"
        assert (checkpoint / "selection.json").is_file()
        ended = [json.loads((root / n / f"{method}-out-0" / "results.json").read_text()) for n in ("1", "2")]
        lost = [end.pop("retention")["series"] for end in ended]
        protected = [end.pop("protection") for end in ended]
        if kind == "ddp" and not method.endswith("experts"):
            assert max(each.pop("left") for each in protected) < 1e-6
            assert protected[0]["inputs"] > 0
        assert protected[0] == protected[1]
        for end in ended:
            assert ((end.pop("kl_to_base") is None), end["replay"] is None) == 2 * (
                kind != "ddp" or "experts" in method,
            )
        assert ended[0] == ended[1]
        for name, series in lost[0].items():
            assert lost[1][name]["rise"] == pytest.approx(series["rise"], abs=1e-5)
        assert ended[0]["guard"]["neurons"] == (~masks[0]).count
        others = {p.name for p in (root / "2" / f"{method}-out-1").rglob("*") if p.is_file()}
        assert others == {"rng_state_1.pth"}  # which every process of a Trainer keeps of its own


@pytest.mark.slow
@pytest.mark.parametrize("form", ["FULL_STATE_DICT", "SHARDED_STATE_DICT", "none"])
def test_two_processes_go_on_from_a_checkpoint(form, tmp_path):
    """Under FSDP2 with checkpoints of either form, and under DDP: to the weights of the whole run."""
    run_processes(2, SCRIPT, 2, form, tmp_path)
    for method in ("neuron_delta", "lora", "full"):
        directory = tmp_path / method / "checkpoint-2"
        assert (directory / "functional_networks" / "complete.json").is_file()
        assert (directory / "pytorch_model_fsdp_0").is_dir() == (form == "SHARDED_STATE_DICT")
        assert (tmp_path / f"{method}-end" / "functional_networks" / "selection.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_accelerate_reads_every_recipe_and_its_command_names_files_that_exist(recipe):
    config = load_config_from_file(str(recipe))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[recipe.stem]
    command = shlex.split(recipe.read_text().splitlines()[0].removeprefix("# "))
    assert command[:3] == ["accelerate", "launch", "--config_file"]
    root = RECIPES[0].parent.parent.parent
    assert root / command[3] == recipe
    assert command[4:6] == ["-m", "fnsft_trl.cli.train"]
    assert (root / command[command.index("--config") + 1]).is_file()


def test_there_is_a_recipe_for_each_kind():
    assert [path.stem for path in RECIPES] == ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]
