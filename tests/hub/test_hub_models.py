"""Trained models, merged models and the templates beside them on the Hub, against the loopback Hub."""

import json
import logging

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import sft_config
from hub import ALICE, BOB, READER
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate
from fnsft_trl.cli import main


FILES = ("config.json", "template.safetensors", "README.md", "networks.svg")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def template(templates):
    return templates["llama"]


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_discover_pushes(hub, model_dir, data, tmp_path, capsys):
    arguments = ["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "made"), "--license", "mit"]
    arguments += ["--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "200", "--ica_percentile", "80"]
    push = ["--push_to_hub", "alice/made", "--private", "--hub_revision", "first", "--hub_token", ALICE]
    assert main([*arguments, *push]) == 0
    assert hub.repos["alice/made"].private
    assert "Pushed to: http" in capsys.readouterr().out
    pushed = hub.files("alice/made", "first")
    local = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert all(pushed[name] == local[name] for name in FILES if name != "README.md")
    assert b"license: mit" in pushed["README.md"]
    assert not any(ALICE.encode() in content for content in (*local.values(), *pushed.values()))
    for wrong, message in ((["--push_to_hub", "nowhere"], "org/name"), (["--private"], "go with push_to_hub")):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_run_names_the_commit_of_its_template_and_is_pushed_without_tokens(hub, template, model_dir, data, tmp_path):
    old = template.push_to_hub("alice/networks").rsplit("/", 1)[1]
    hub.put("alice/networks", {"config.json": b"{}"})  # main moved on, and is no template any more
    output = tmp_path / "tuned"
    settings = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(data),
        "ica_template_path": "alice/networks",
        "ica_template_revision": old[:40],
        "output_dir": str(output),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": 32,
        "save_strategy": "no",
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": "alice/tuned",
        "hub_token": ALICE,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    selection = json.loads((output / "functional_networks" / "selection.json").read_text())
    assert selection["template"] == {"hub_id": "alice/networks", "commit": old, "base_model": template.base_model}
    pushed = hub.files("alice/tuned")
    assert f"at commit `{old}`" in pushed["README.md"].decode()
    assert "alice/networks" in pushed["README.md"].decode()
    assert {"adapter_config.json", "functional_networks/config.json"} <= set(pushed)
    assert not any(ALICE.encode() in content for content in pushed.values())
    assert not [path for path in output.rglob("*") if path.is_file() and ALICE.encode() in path.read_bytes()]


def test_the_trainer_discovers_trains_and_pushes(hub, model_dir, rows, tokenizer, tmp_path):
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_fraction=0.2)
    trainer = FNSFTTrainer(
        model=str(model_dir),
        args=sft_config(tmp_path / "out", max_steps=1, push_to_hub=True, hub_model_id="alice/python"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        network_config=config,
    )
    trainer.train()
    trainer.push_to_hub()
    pushed = hub.files("alice/python")
    assert {"adapter_model.safetensors", "functional_networks/template.safetensors"} <= set(pushed)
    pulled = FunctionalNetworkTemplate.from_pretrained("alice/python", cache_dir=tmp_path / "cache")
    assert pulled.commit == hub.repos["alice/python"].refs["main"]
    assert pulled.components == trainer.network_template.components


def train(model_dir, data, output, **changes) -> int:
    """`fnsft train` for one step."""
    settings = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(data),
        "output_dir": str(output),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": 32,
        "disable_tqdm": True,
        "ica_components": 2,
        "ica_rank": 8,
        "ica_max_tokens": 200,
        "ica_fraction": 0.2,
        "push_to_hub": True,
        **changes,
    }
    config = output.parent / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return main(["train", "--config", str(config)])


@pytest.mark.slow
def test_a_run_is_pushed_to_a_private_branch_with_its_checkpoints(hub, model_dir, data, tmp_path):
    to = {"hub_model_id": "alice/tuned", "hub_private_repo": True, "hub_revision": "trial"}
    output = tmp_path / "out"
    to |= {"hub_strategy": "all_checkpoints", "save_steps": 1, "save_strategy": "steps"}
    assert train(model_dir, data, output, **to) == 0
    repo = hub.repos["alice/tuned"]
    assert repo.private
    assert set(hub.files("alice/tuned")) == {".gitattributes"}
    pushed = hub.files("alice/tuned", "trial")
    assert {"adapter_model.safetensors", "functional_networks/config.json", "README.md"} <= set(pushed)
    assert {"checkpoint-1/adapter_model.safetensors", "checkpoint-1/functional_networks/selection.json"} <= set(pushed)
    everything = b"".join(content for files in repo.commits.values() for content in files.values())
    assert ALICE.encode() not in everything
    # And it does so in every commit with weights, as those that are made on the way.
    with_weights = [files for files in repo.commits.values() if "adapter_model.safetensors" in files]
    assert len(with_weights) > 1
    assert all("functional_networks/selection.json" in files for files in with_weights)
    assert not any("functional_networks/complete.json" in files for files in with_weights)
    assert b"# Model Card for tuned" in pushed["README.md"]
    assert b"None" not in pushed["README.md"]
    for card in ("README.md", "checkpoint-1/README.md"):  # model and dataset are local files
        assert not any(str(path).encode() in pushed[card] for path in (tmp_path, model_dir))
    template = FunctionalNetworkTemplate.from_pretrained("alice/tuned", revision="trial", cache_dir=tmp_path / "cache")
    assert len(template.components) == 2


def test_a_run_opens_no_door_without_the_right_to_write(hub, model_dir, data, tmp_path, capfd):
    hub.put("team/tuned", {"README.md": b""})  # where alice is a member that may only read
    assert train(model_dir, data, tmp_path / "out", hub_model_id="team/tuned", hub_revision="trial") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fnsft train: error: the Hub refused access to team/tuned (403)")
    assert ALICE not in line


@pytest.mark.slow
def test_no_log_holds_a_token(hub, model_dir, data, tmp_path, capfd, caplog):
    """Of whatever library, down to the level of debugging."""
    transformers_logging.enable_propagation()
    names = ("", "transformers", "huggingface_hub", "httpx", "httpcore", "fnsft_trl")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        assert train(model_dir, data, tmp_path / "out", hub_model_id="alice/logs", hub_token=ALICE) == 0
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.disable_propagation()
    printed = capfd.readouterr()
    assert len(caplog.records) > 20
    assert ALICE not in printed.out + printed.err + caplog.text


def test_a_template_is_found_in_the_repository_of_a_trained_model(hub, template, files_of_models, cache, tmp_path):
    """Beside an adapter, whose repository has no config.json, and beside a model, whose config.json is the model's."""
    for kind, files in files_of_models.items():
        hub.put(f"alice/{kind}", files)
        template.save_pretrained(tmp_path / kind / "functional_networks")
        own = {path.name: path.read_bytes() for path in (tmp_path / kind / "functional_networks").iterdir()}
        for name, content in files.items():
            (tmp_path / kind / name).write_bytes(content)
        assert FunctionalNetworkTemplate.from_pretrained(tmp_path / kind).components == template.components
        with pytest.raises(FNSFTError, match="holds no template"):
            FunctionalNetworkTemplate.from_pretrained(f"alice/{kind}", cache_dir=cache)
        commit = hub.put(f"alice/{kind}", {f"functional_networks/{name}": content for name, content in own.items()})
        hub.requests.clear()
        for options in ({}, {"revision": commit}, {"local_files_only": True}):
            loaded = FunctionalNetworkTemplate.from_pretrained(f"alice/{kind}", cache_dir=cache, **options)
            assert loaded.components == template.components
            assert (loaded.hub_id, loaded.commit) == (f"alice/{kind}", commit)
        fetched = {path.split("/", 5)[-1] for method, path in hub.requests if method == "GET"}
        inner = {"functional_networks/config.json", "functional_networks/template.safetensors"}
        assert fetched <= {"config.json", *inner}


@pytest.fixture
def files_of_models(model_dir):
    model = {"config.json": (model_dir / "config.json").read_bytes(), "model.safetensors": b"weights"}
    return {"adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}, "model": model}


def test_an_adapter_and_the_merged_model_go_into_one_repository_or_apart(hub, model_dir, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert train(model_dir, data, output, hub_model_id="alice/tuned", save_strategy="no") == 0
    export = ["export", str(output), "--to", "merged", "--output_dir", str(tmp_path / "merged"), "--push_to_hub"]
    assert main([*export, "alice/tuned", "--hub_subfolder", "merged"]) == 0
    assert main([*export, "alice/merged", "--private", "--hub_revision", "v1"]) == 0
    assert "Pushed to: http" in capsys.readouterr().out
    together, apart = hub.files("alice/tuned"), hub.files("alice/merged", "v1")
    assert hub.repos["alice/merged"].private
    assert "adapter_model.safetensors" in together
    assert "adapter_model.safetensors" not in apart
    for name in ("config.json", "model.safetensors", "README.md", "functional_networks/template.safetensors"):
        assert together[f"merged/{name}"] == apart[name]
    # Of several files at the top, PEFT takes the adapter, unless it is told where to look.
    inner = {"subfolder": "merged", "adapter_kwargs": {"subfolder": "merged"}}
    first, second = (
        AutoModelForCausalLM.from_pretrained("alice/tuned", **inner).state_dict(),
        AutoModelForCausalLM.from_pretrained("alice/merged", revision="v1").state_dict(),
    )
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert first.keys() == second.keys() == before.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)
    card = apart["README.md"].decode()
    assert "library_name: transformers" in card
    assert "neurons (20.0% of the MLP neurons) could change" in card
    assert "fnsft_trl.tuner" not in card
    assert str(tmp_path) not in card
    for wrong, message in ((["--push_to_hub", "nowhere"], "org/name"), (["--create_pr"], "go with push_to_hub")):
        assert main([*export[:-1], *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_plain_lora_is_proposed_to_someone_else_s_repository(hub, model_dir, data, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert train(model_dir, data, output, push_to_hub=False, save_strategy="no") == 0
    hub.put("alice/lora", {"README.md": b""})
    monkeypatch.setenv("HF_TOKEN", BOB)
    export = ["export", str(output), "--to", "lora", "--output_dir", str(tmp_path / "lora")]
    assert main([*export, "--push_to_hub", "alice/lora", "--create_pr"]) == 0
    assert "adapter_config.json" in hub.files("alice/lora", "refs/pr/1")
    assert set(hub.files("alice/lora")) == {"README.md"}


def test_work_for_a_push_does_not_start_without_the_right(hub, model_dir, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    discover = ["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "made")]
    export = ["export", str(tmp_path), "--to", "lora", "--output_dir", str(tmp_path / "made")]
    for command in (discover, export):
        assert main([*command, "--push_to_hub", "alice/made"]) == 2
        assert "may only read, so nothing could be pushed" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", BOB)
    for command in (discover, export):
        assert main([*command, "--push_to_hub", "alice/made"]) == 2
        assert "not to alice/made" in capsys.readouterr().err
    assert train(model_dir, data, tmp_path / "made", hub_model_id="alice/made") == 2
    assert not (tmp_path / "made").exists()


def test_a_model_that_may_not_be_read_is_one_line(hub, files_of_models, data, tmp_path, capsys, monkeypatch):
    hub.put("alice/base", files_of_models["model"])
    monkeypatch.setenv("HF_TOKEN", BOB)
    commands = (
        ["discover", "alice/base", str(data), "--output_dir", str(tmp_path / "made")],
        ["train", "--model_name_or_path", "alice/base", "--dataset_name", str(data), "--use_cpu", "--bf16", "false"],
    )
    refusals = {"gated": "ask for it on the repository's page", "private": "it is private and your token"}
    for right, message in refusals.items():
        hub.repos["alice/base"].gated, hub.repos["alice/base"].private = right == "gated", right == "private"
        for command in commands:
            assert main(command) == 2
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line.startswith(f"fnsft {command[0]}: error: the model 'alice/base' cannot be loaded")
            assert message in line
            assert "hf auth login" in line


def test_a_revision_without_a_template_is_refused():
    with pytest.raises(FNSFTError, match="ica_template_revision without ica_template_path"):
        FunctionalNetworkConfig(ica_template_revision="v1")
