"""Nothing is written over what is read, nor over a model, an adapter or a template: refused before it happens."""

import json

import pytest
from helpers import tiny_model, tiny_rows, tiny_tokenizer
from hub import ALICE
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, NeuronTunerConfig
from fnsft_trl.cli import main
from fnsft_trl.export import to_merged, to_plain_lora
from fnsft_trl.hub.files import push_directory
from fnsft_trl.occupied import ADAPTER, EXPORTED_ADAPTER, EXPORTED_MODEL, MODEL, REPORT, TEMPLATE, check_target


@pytest.fixture(scope="module")
def home(tmp_path_factory, templates):
    """One folder of each kind."""
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    peft = get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons={"0": "0-3"}, task_type="CAUSAL_LM"))
    peft.peft_config["default"].base_model_name_or_path = str(home / "model")
    peft.save_pretrained(home / "adapter")
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(home / "lora")
    templates["llama"].save_pretrained(home / "template")
    to_merged(home / "adapter", home / "merged")
    to_plain_lora(home / "adapter", home / "exported")
    (home / "lists").mkdir()
    (home / "lists/global_templates.json").write_text("{}")
    (home / "run").mkdir()
    (home / "run/results.json").write_text(json.dumps({"format": "fnsft_trl.run"}))
    (home / "report").mkdir()
    (home / "report/results.json").write_text("{}")
    (home / "data").mkdir()
    (home / "data/README.md").write_text("# my data")
    (home / "data/rows.txt").write_text("\n".join(row["prompt"] + row["completion"] for row in tiny_rows()))
    return home


def state(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FREE = {
    TEMPLATE: {"template", "report", "data"},
    MODEL: {"model", "merged", "lists", "run", "report", "data"},
    ADAPTER: {"adapter", "lora", "exported", "lists", "run", "report", "data"},
    EXPORTED_MODEL: {"merged", "lists", "run", "report", "data"},
    EXPORTED_ADAPTER: {"exported", "lists", "run", "report", "data"},
    REPORT: {"template", "report", "data", "lists"},
}


@pytest.mark.parametrize("kind", FREE)
def test_what_may_be_written_where(home, kind):
    for folder in home.iterdir():
        if folder.name in FREE[kind]:
            check_target(folder, kind)
        else:
            with pytest.raises(FNSFTError, match=r"holds .*name another place"):
                check_target(folder, kind)
    check_target(home / "new", kind)


def test_what_is_read_is_not_written_over_by_any_way_to_it(home, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(home / "data")
    monkeypatch.chdir(home / "model")
    for name in (home / "data", tmp_path / "link", "../data", str(home / "model/../data/")):
        with pytest.raises(FNSFTError, match="the directory of the rows"):
            check_target(name, TEMPLATE, sources={"the rows": home / "data"})
    check_target(home / "data", TEMPLATE, sources={"the model": "org/data", "nothing": None, "other": "../no"})


def refused(capsys, *argv):
    assert main([str(part) for part in argv]) == 2, argv
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def test_every_verb_refuses_before_anything_is_written(home, capsys, tmp_path):
    before = state(home)
    small = ("--ica_max_tokens", 100, "--ica_components", 2, "--ica_rank", 4)
    for folder in ("model", "adapter", "lora", "merged", "lists"):
        told = refused(
            capsys, "discover", home / "model", home / "data/rows.txt", "--output_dir", home / folder, *small
        )
        assert "destroy" in told
        told = refused(capsys, "inspect", home / "template", "--convert", home / folder)
        assert "holds a" in told
    assert "the dataset" in refused(capsys, "discover", home / "model", home / "data", "--output_dir", home / "data")
    for form, folders in (
        ("merged", ("model", "adapter", "lora", "template", "exported")),
        ("lora", ("model", "adapter", "lora", "template", "merged")),
    ):
        for folder in folders:
            told = refused(capsys, "export", home / "adapter", "--to", form, "--output_dir", home / folder)
            assert "destroy" in told
    for folder in ("run", "model", "adapter"):
        assert "report" in refused(
            capsys, "compare", home / "template", home / "template", "--output_dir", home / folder
        )
    trains = (
        "train",
        "--dataset_name",
        home / "data/rows.txt",
        "--max_steps",
        1,
        "--model_name_or_path",
        home / "model",
    )
    networks = ("--ica_template_path", home / "template", "--no_peft")
    assert "the model to train" in refused(capsys, *trains, *networks, "--output_dir", home / "model")
    assert "holds a template" in refused(capsys, *trains, *networks, "--output_dir", home / "template")
    told = refused(capsys, *trains, *networks, "--output_dir", tmp_path, "--ica_template_output", tmp_path)
    assert "the trained model" in told
    assert state(home) == before
    assert list(tmp_path.iterdir()) == []


def test_python_refuses_too(home, templates, tmp_path):
    before = state(home)
    for folder in ("model", "adapter", "lists", "run"):
        with pytest.raises(FNSFTError, match="holds"):
            templates["llama"].save_pretrained(home / folder)
    with pytest.raises(FNSFTError, match="its base model"):
        to_merged(home / "adapter", home / "model")
    from helpers import sft_config

    with pytest.raises(FNSFTError, match="the directory of the model to train"):
        FNSFTTrainer(
            model=str(home / "model"),
            args=sft_config(home / "model"),
            network_config=FunctionalNetworkConfig(train_method="full"),
            network_template=templates["llama"],
        )
    assert state(home) == before


def test_exports_are_written_over_older_exports(home, tmp_path):
    for _ in range(2):
        to_merged(home / "adapter", tmp_path / "merged")
        to_plain_lora(home / "adapter", tmp_path / "lora")


def test_repositories_are_held_to_the_same(hub, home, templates, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    hub.put("alice/model", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x", "README.md": b"#"})
    hub.put("alice/data", {"README.md": b"# new"})
    before = hub.files("alice/model")
    with pytest.raises(FNSFTError, match="the repository alice/model holds a model"):
        templates["llama"].push_to_hub("alice/model")
    argv = ("export", home / "adapter", "--to", "merged", "--output_dir", home / "again", "--push_to_hub")
    assert "holds a model" in refused(capsys, *argv, "alice/model")
    assert not (home / "again").exists()
    assert hub.files("alice/model") == before
    templates["llama"].push_to_hub("alice/data")
    templates["llama"].push_to_hub("alice/data")
    assert "holds a template" in refused(capsys, *argv, "alice/data")
    with pytest.raises(FNSFTError, match="holds a template"):
        push_directory(home / "merged", "alice/data", commit_message="merged")
    assert "holds a template" in refused(
        capsys,
        "train",
        "--dataset_name",
        home / "data/rows.txt",
        "--max_steps",
        1,
        "--model_name_or_path",
        home / "model",
        "--output_dir",
        home / "pushed",
        "--push_to_hub",
        "--hub_model_id",
        "alice/data",
    )
