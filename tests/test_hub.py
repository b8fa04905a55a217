"""Templates on the Hub: pushed, pulled and pinned, against the loopback Hub."""

import json
import os
import re
import subprocess
import sys
import traceback

import pytest
import yaml
from hub import ALICE, BOB, READER, save_login

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate
from fnsft_trl.card import template_card
from fnsft_trl.cli import main
from fnsft_trl.description import describe


FILES = ("config.json", "template.safetensors", "README.md", "networks.svg")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def template(templates):
    return templates["llama"]


def written(template, directory) -> dict[str, bytes]:
    template.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(cache, repo_id="alice/networks", **options) -> str:
    """The message of a template that cannot be had: one line, without a token."""
    with pytest.raises(FNSFTError) as caught:
        FunctionalNetworkTemplate.from_pretrained(repo_id, cache_dir=cache, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search("hf_[a-z]", "".join(traceback.format_exception(caught.value)))
    return message


def test_pushed_and_pulled_in_a_fresh_process_it_is_the_same_bytes(hub, template, tmp_path):
    url = template.push_to_hub("alice/networks", commit_message="first")
    pushed = {name: hub.files("alice/networks")[name] for name in FILES}
    code = (
        "import sys; from fnsft_trl import FunctionalNetworkTemplate as T\n"
        "t = T.from_pretrained('alice/networks', cache_dir=sys.argv[1])\n"
        "t.save_pretrained(sys.argv[2]); print(t.commit)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == pushed
    assert done.stdout.strip() == hub.repos["alice/networks"].refs["main"] == url.rsplit("/", 1)[1]
    assert hub.repos["alice/networks"].messages[-1] == "first"
    own = written(template, tmp_path / "own")
    assert all(own[name] == pushed[name] for name in ("config.json", "template.safetensors", "networks.svg"))
    assert 'from_pretrained("alice/networks")' in pushed["README.md"].decode()


def test_only_the_two_allowed_files_are_fetched_and_from_one_commit(hub, template, cache):
    template.push_to_hub("alice/networks")
    hub.put("alice/networks", {"pytorch_model.bin": b"pickle", "evil.py": b"1/0", "sub/config.json": b"{}"})
    hub.requests.clear()
    loaded = FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache)
    fetched = {path for method, path in hub.requests if method == "GET"}
    assert {path.rsplit("/", 1)[1] for path in fetched} == {"config.json", "template.safetensors"}
    assert (loaded.hub_id, loaded.commit) == ("alice/networks", hub.repos["alice/networks"].refs["main"])
    assert f"/alice/networks/resolve/{loaded.commit}/template.safetensors" in fetched


def test_a_branch_a_commit_and_a_tag_pin_a_template(hub, templates, cache):
    first, second = templates["llama"], templates["opt"]
    old = first.push_to_hub("alice/networks").rsplit("/", 1)[1]
    second.push_to_hub("alice/networks", branch="opt")
    hub.repos["alice/networks"].refs["v1"] = old
    second.push_to_hub("alice/networks", revision="main")
    found = {
        revision: FunctionalNetworkTemplate.from_pretrained("alice/networks", revision=revision, cache_dir=cache)
        for revision in (None, "opt", "v1", old)
    }
    assert [t.architecture for t in found.values()] == [second.architecture] * 2 + [first.architecture] * 2
    assert found["v1"].commit == found[old].commit == old
    offline = FunctionalNetworkTemplate.from_pretrained(
        "alice/networks", revision=old, cache_dir=cache, local_files_only=True
    )
    assert offline.components == first.components


def test_a_pull_request_leaves_the_branch_alone(hub, template, cache):
    before = hub.put("alice/networks", {"README.md": b"nothing yet"})
    template.push_to_hub("alice/networks", create_pr=True)
    assert hub.repos["alice/networks"].refs["main"] == before
    loaded = FunctionalNetworkTemplate.from_pretrained("alice/networks", revision="refs/pr/1", cache_dir=cache)
    assert loaded.components == template.components


def test_whoever_may_read_may_propose_a_change(hub, template, templates, cache):
    template.push_to_hub("alice/networks")
    url = templates["opt"].push_to_hub("alice/networks", create_pr=True, token=BOB)
    assert url.rsplit("/", 1)[1] == hub.repos["alice/networks"].refs["refs/pr/1"]
    proposed = FunctionalNetworkTemplate.from_pretrained("alice/networks", revision="refs/pr/1", cache_dir=cache)
    assert proposed.architecture == templates["opt"].architecture
    assert FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache).architecture != proposed


def test_save_pretrained_pushes_when_asked(hub, template, tmp_path):
    template.save_pretrained(tmp_path / "t", repo_id="alice/saved", push_to_hub=True, private=True)
    assert set(FILES) <= set(hub.files("alice/saved"))
    assert hub.repos["alice/saved"].private


def test_who_may_not_read_is_told_what_to_do(hub, template, cache, monkeypatch):
    template.push_to_hub("alice/networks", private=True)
    for token in (BOB, False):
        message = refused(cache, token=token)
        assert "it is private and your token does not open it" in message
        assert "hf auth login" in message
    assert "the token is not valid" in refused(cache, token="hf_wrongwrongwrong")
    hub.repos["alice/networks"].private = False
    hub.repos["alice/networks"].gated = True
    assert "ask for it on the repository's page" in refused(cache, token=BOB)
    FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache, token=ALICE)


def test_what_is_not_there_is_named(hub, template, cache):
    hub.put("alice/model", {"weights.bin": b""})
    assert "no repository alice/networks" in refused(cache)
    assert "alice/networks is not in the local cache" in refused(cache, local_files_only=True)
    template.push_to_hub("alice/networks")
    assert "no revision 'v9'" in refused(cache, revision="v9")
    assert "holds no template" in refused(cache, "alice/model")
    assert "drop one" in refused(cache, os.path.curdir, revision="v1")


def test_who_may_not_write_is_told_what_to_do(hub, template, monkeypatch):
    hub.put("alice/networks", {"README.md": b""})
    wrong = "hf_wrongwrongwrongwrong"
    for token, repo_id in (
        (BOB, "alice/networks"),
        (BOB, "alice/other"),
        (READER, "alice/networks"),
        (wrong, "alice/networks"),
    ):
        with pytest.raises(FNSFTError, match="the Hub refused access") as caught:
            template.push_to_hub(repo_id, token=token)
        assert token not in "".join(traceback.format_exception(caught.value))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FNSFTError, match="hf auth login"):
        template.push_to_hub("alice/networks")
    with pytest.raises(FNSFTError, match="write org/name"):
        template.push_to_hub("alice/a/b")


def test_the_token_given_wins_over_the_environment_wins_over_the_saved_one(hub, template, no_token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", BOB)
    template.push_to_hub("alice/given", token=ALICE)
    template.push_to_hub("bob/environment")
    save_login(ALICE)
    template.push_to_hub("bob/still-environment")
    monkeypatch.delenv("HF_TOKEN")
    template.push_to_hub("alice/saved")
    assert {repo.owner for repo in hub.repos.values()} == {"alice", "bob"}
    everything = b"".join(b"".join(hub.files(name).values()) for name in hub.repos)
    assert ALICE.encode() not in everything
    assert BOB.encode() not in everything


def test_a_download_that_breaks_off_goes_on(hub, template, cache):
    template.push_to_hub("alice/networks")
    hub.cut = 1
    loaded = FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache)
    assert loaded.components == template.components
    gets = [path for method, path in hub.requests if method == "GET" and path.endswith(FILES[0])]
    assert len(gets) == 2


def test_a_download_that_keeps_breaking_off_is_one_line_and_leaves_nothing_half(hub, template, cache):
    template.push_to_hub("alice/networks")
    hub.cut = 100
    message = refused(cache)
    hub.cut = 0
    assert "alice/networks" in message
    assert not list(cache.rglob("snapshots/*/template.safetensors"))
    assert (
        FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache).components == template.components
    )


def test_a_download_that_is_killed_goes_on_in_the_next_process(hub, template, cache):
    template.push_to_hub("alice/networks")
    code = (
        "import os, sys, huggingface_hub.file_download as f\n"
        "from fnsft_trl import FunctionalNetworkTemplate as T\n"
        "write = f.http_get\n"
        "def dies(url, temp_file, **options):\n"
        "    write(url, temp_file, **options)\n"
        "    if url.endswith('safetensors'):\n"
        "        temp_file.truncate(100)\n"
        "        temp_file.flush()\n"
        "        os._exit(9)\n"
        "f.http_get = dies\n"
        "T.from_pretrained('alice/networks', cache_dir=sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not list(cache.rglob("snapshots/*/template.safetensors"))
    loaded = FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache)
    assert loaded.components == template.components


def test_without_a_connection_the_cache_is_read_and_nothing_is_pushed(hub, template, cache):
    template.push_to_hub("alice/networks")
    FunctionalNetworkTemplate.from_pretrained("alice/networks", cache_dir=cache)
    code = (
        "import sys\nfrom fnsft_trl import FunctionalNetworkTemplate as T, FNSFTError\n"
        "t = T.from_pretrained('alice/networks', cache_dir=sys.argv[1])\nprint(t.commit)\n"
        "for work in (lambda: t.push_to_hub('alice/other'), lambda: T.from_pretrained('alice/missing')):\n"
        "    try: work()\n    except FNSFTError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True, env=environment
    )
    commit, push, load = done.stdout.strip().splitlines()
    assert commit == hub.repos["alice/networks"].refs["main"]
    assert "the Hub cannot be reached for alice/other" in push
    assert "alice/missing is not in the local cache" in load
    assert hub.requests == []


def test_a_hub_that_is_down_is_one_line(hub, template, cache):
    hub.down = 500
    assert "alice/networks" in refused(cache)
    with pytest.raises(FNSFTError, match="the Hub answered 500 for alice/networks"):
        template.push_to_hub("alice/networks")


def test_a_card_that_the_hub_refuses_is_one_line(hub, template):
    template.license = "Apache License 2.0"
    try:
        with pytest.raises(FNSFTError, match=r"refuses the model card for alice/networks.*license") as caught:
            template.push_to_hub("alice/networks")
    finally:
        template.license = None
    assert "\n" not in str(caught.value)


def test_a_token_that_cannot_be_sent_is_not_shown(hub, template, cache):
    for token in ("hf_secretsecretsecret\n", "hf_secretsecret secret", "hf_sécrétsécrétsécrét"):
        assert "copy it again" in refused(cache, token=token)
        with pytest.raises(FNSFTError, match="copy it again"):
            template.push_to_hub("alice/networks", token=token)
    assert hub.requests == []


def test_a_file_damaged_on_the_hub_is_refused(hub, template, cache):
    template.push_to_hub("alice/networks")
    whole = hub.files("alice/networks")["template.safetensors"]
    hub.put("alice/networks", {"template.safetensors": whole[:-4] + b"\0\0\0\0"})
    assert "is not the file that config.json describes" in refused(cache)
    hub.put("alice/networks", {"template.safetensors": whole[:-4]})
    assert "its header asks for" in refused(cache)


def test_inspect_reads_the_hub_without_torch_and_without_the_tensors(hub, template):
    template.push_to_hub("alice/networks", branch="v2")
    hub.requests.clear()
    code = (
        "import sys; from fnsft_trl.cli import main\n"
        "status = main(['inspect', 'alice/networks', '--revision', 'v2'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"alice/networks at commit {hub.repos['alice/networks'].refs['v2']}" in done.stdout
    assert "3 functional networks" in done.stdout
    assert not any(path.endswith(".safetensors") for _, path in hub.requests)


def test_inspect_of_what_is_not_there_is_one_line(hub, capsys):
    assert main(["inspect", "alice/nothing"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no repository alice/nothing" in line


def test_the_card_is_made_from_the_data(hub, template):
    from huggingface_hub import ModelCard

    template.base_model, template.license = "org/base", "mit"
    template.calibration = {**template.calibration, "sources": ["org/corpus", "notes.txt", "a/b.jsonl"]}
    try:
        template.push_to_hub("alice/networks")
        card = ModelCard(hub.files("alice/networks")["README.md"].decode())
    finally:
        template.base_model, template.license = "", None
        template.calibration = {**template.calibration, "sources": ["texts given in memory"]}
    data = card.data
    assert (data.library_name, data.base_model, data.license) == ("fnsft_trl", "org/base", "mit")
    assert data.datasets == ["org/corpus"]
    assert {"fnsft", "functional-networks"} <= set(data.tags)
    for number, component in enumerate(template.components):
        assert f"| {number} | {component.neurons} | {len(component.layers)} |" in card.text
        assert f"| {component.reliability:.2f} |" in card.text
    assert "250 tokens of org/corpus, notes.txt, a/b.jsonl" in card.text
    assert "must not be used for" in card.text
    svg = hub.files("alice/networks")["networks.svg"].decode()
    for number, component in enumerate(template.components):
        for layer, count in component.layers.items():
            assert f"network {number}, layer {layer}: {count / 40:.1%}" in svg


def test_the_code_of_the_card_runs(hub, template):
    from helpers import tiny_model

    template.push_to_hub("alice/networks")
    card = hub.files("alice/networks")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    namespace = {"model": tiny_model("llama")}
    exec(code, namespace)
    assert namespace["mask"].count == template.components[0].neurons
    assert len(code.strip().splitlines()) <= 6


def test_cards_of_equal_templates_are_equal_and_name_what_is_unknown(template, tmp_path):
    config = describe(template, "0" * 64)
    assert template_card(config) == template_card(describe(template, "0" * 64))
    config = {**config, "components": [{**c, "reliability": None} for c in config["components"]]}
    assert "Reliability is unknown" in template_card(config)


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
    for wrong, message in ((["--push_to_hub", "nowhere"], "org/name"), (["--private"], "go with --push_to_hub")):
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
    from datasets import Dataset
    from helpers import sft_config

    from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig

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


def test_a_run_is_pushed_to_a_private_branch_with_its_checkpoints(hub, model_dir, data, tmp_path):
    to = {"hub_model_id": "alice/tuned", "hub_private_repo": True, "hub_revision": "trial"}
    output = tmp_path / "out"
    assert train(model_dir, data, output, **to, hub_strategy="all_checkpoints", save_steps=1, save_strategy="steps") == 0
    repo = hub.repos["alice/tuned"]
    assert repo.private
    assert set(hub.files("alice/tuned")) == {".gitattributes"}
    pushed = hub.files("alice/tuned", "trial")
    assert {"adapter_model.safetensors", "functional_networks/config.json", "README.md"} <= set(pushed)
    assert {"checkpoint-1/adapter_model.safetensors", "checkpoint-1/functional_networks/selection.json"} <= set(pushed)
    everything = b"".join(content for files in repo.commits.values() for content in files.values())
    assert ALICE.encode() not in everything
    assert str(tmp_path) not in pushed["README.md"].decode()  # the dataset is a local file
    template = FunctionalNetworkTemplate.from_pretrained("alice/tuned", revision="trial", cache_dir=tmp_path / "cache")
    assert len(template.components) == 2


def test_a_run_opens_no_door_without_the_right_to_write(hub, model_dir, data, tmp_path, capfd, monkeypatch):
    hub.put("alice/tuned", {"README.md": b""})
    monkeypatch.setenv("HF_TOKEN", BOB)
    assert train(model_dir, data, tmp_path / "out", hub_model_id="alice/tuned", hub_revision="trial") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fnsft train: error: the Hub refused access to alice/tuned (403)")
    assert BOB not in line


def test_no_log_holds_a_token(hub, model_dir, data, tmp_path, capfd, caplog):
    """Of whatever library, down to the level of debugging."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    loggers = [logging.getLogger(name) for name in ("", "transformers", "huggingface_hub", "httpx", "httpcore", "fnsft_trl")]
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
        own = written(template, tmp_path / kind / "functional_networks")
        for name, content in files.items():
            (tmp_path / kind / name).write_bytes(content)
        assert FunctionalNetworkTemplate.from_pretrained(tmp_path / kind).components == template.components
        assert "holds no template" in refused(cache, f"alice/{kind}")
        commit = hub.put(f"alice/{kind}", {f"functional_networks/{name}": content for name, content in own.items()})
        hub.requests.clear()
        for options in ({}, {"revision": commit}, {"local_files_only": True}):
            loaded = FunctionalNetworkTemplate.from_pretrained(f"alice/{kind}", cache_dir=cache, **options)
            assert loaded.components == template.components
            assert (loaded.hub_id, loaded.commit) == (f"alice/{kind}", commit)
        fetched = {path.split("/", 5)[-1] for method, path in hub.requests if method == "GET"}
        assert fetched <= {"config.json", "functional_networks/config.json", "functional_networks/template.safetensors"}


.fixture
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
    for of_model in ({"pretrained_model_name_or_path": "alice/tuned", "subfolder": "merged"},
                     {"pretrained_model_name_or_path": "alice/merged", "revision": "v1"}):
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(**of_model, cache_dir=tmp_path / "cache")
        assert loaded.num_parameters() == AutoModelForCausalLM.from_pretrained(model_dir).num_parameters()
    card = apart["README.md"].decode()
    assert "library_name: transformers" in card
    assert "neurons (20.0% of the MLP neurons) could change" in card
    assert "fnsft_trl.tuner" not in card
    assert str(tmp_path) not in card
    for wrong, message in ((["--push_to_hub", "nowhere"], "org/name"), (["--create_pr"], "go with --push_to_hub")):
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


def test_work_for_a_push_does_not_start_without_the_right_to_write(hub, model_dir, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    discover = ["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "made")]
    export = ["export", str(tmp_path), "--to", "lora", "--output_dir", str(tmp_path / "made")]
    for command in (discover, export):
        assert main([*command, "--push_to_hub", "alice/made"]) == 2
        assert "may only read, so nothing could be pushed" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_model_that_may_not_be_read_is_one_line(hub, files_of_models, data, tmp_path, capsys, monkeypatch):
    hub.put("alice/base", files_of_models["model"])
    monkeypatch.setenv("HF_TOKEN", BOB)
    commands = (
        ["discover", "alice/base", str(data), "--output_dir", str(tmp_path / "made")],
        ["train", "--model_name_or_path", "alice/base", "--dataset_name", str(data), "--use_cpu", "--bf16", "false"],
    )
    for right, message in (("gated", "ask for it on the repository's page"), ("private", "it is private and your token")):
        hub.repos["alice/base"].gated, hub.repos["alice/base"].private = right == "gated", right == "private"
        for command in commands:
            assert main(command) == 2
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line.startswith(f"fnsft {command[0]}: error: the model 'alice/base' cannot be loaded")
            assert message in line
            assert "hf auth login" in line


def test_a_revision_without_a_template_is_refused():
    from fnsft_trl import FunctionalNetworkConfig

    with pytest.raises(FNSFTError, match="ica_template_revision without ica_template_path"):
        FunctionalNetworkConfig(ica_template_revision="v1")
