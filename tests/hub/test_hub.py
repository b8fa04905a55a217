"""Templates on the Hub: pushed, pulled and pinned, against the loopback Hub."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import traceback

import pytest
from helpers import tiny_rows
from hub import ALICE, BOB, READER, save_login

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate
from fnsft_trl.cli import main
from fnsft_trl.hub.credentials import hide_tokens
from fnsft_trl.template.card import template_card
from fnsft_trl.template.description import TemplateDescription


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
    told = "".join(traceback.format_exception(caught.value))  # of all exceptions behind it
    assert hide_tokens(told) == told
    return message


@pytest.mark.slow
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


def test_texts_of_a_dataset_are_pushed_only_when_asked(hub, model_dir, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": row["prompt"] * 3}) for row in tiny_rows(30)))
    words = ["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "made"), "--ica_components", "2"]
    words += ["--ica_rank", "8", "--ica_max_tokens", "200", "--examples", "1"]
    for repo_id, more in (("alice/alone", []), ("alice/with_texts", ["--push_examples"])):
        assert main([*words, "--push_to_hub", repo_id, *more]) == 0
        kept = (tmp_path / "made" / "examples.json").read_bytes()
        assert hub.files(repo_id).get("examples.json") == (kept if more else None)
    assert b"data.jsonl" in kept
    assert main([*words[:-2], "--push_to_hub", "alice/none", "--push_examples"]) == 2
    assert "push_examples has no effect without examples" in capsys.readouterr().err


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
    assert "the token is not valid" in refused(cache, token="hf_wrongwrongwrongwrong")
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


def test_a_token_that_is_asked_for_and_missing_is_one_line(hub, no_token, cache):
    assert "there is none; log in with `hf auth login`" in refused(cache, token=True)


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


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub waits seconds before it tries again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_download_that_keeps_breaking_off_is_one_line_and_leaves_nothing_half(hub, template, cache, no_waiting):
    template.push_to_hub("alice/networks")
    hub.cut, hub.sent = 100, 0
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


def test_a_hub_that_is_down_is_one_line(hub, template, cache, no_waiting):
    hub.down = 500
    assert "the Hub answered 500 for alice/networks" in refused(cache)
    assert "cannot be downloaded anew" in refused(cache, force_download=True)
    assert not [path for _, path in hub.requests if "functional_networks" in path]
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
    assert 'model = AutoModelForCausalLM.from_pretrained("org/base")\n' in card.text
    provenance = card.text.split("## Where it comes from")[1].split("##")[0].strip().splitlines()
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in provenance] == [3] * 8  # rows of two cells
    assert "| neurons of a network | &#124;loading&#124; over percentile 80, all layers together |" in provenance
    assert "must not be used for" in card.text
    svg = hub.files("alice/networks")["networks.svg"].decode()
    for number, component in enumerate(template.components):
        for layer, count in component.layers.items():
            assert f"network {number}, layer {layer}: {count / 40:.1%}" in svg


def test_the_code_of_the_card_runs(hub, template, tmp_path):
    from helpers import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    template.push_to_hub("alice/networks")
    card = hub.files("alice/networks")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    namespace = {}
    exec(code.replace("path of the base model", str(tmp_path)), namespace)
    assert namespace["mask"].count == template.components[0].neurons
    assert len(code.strip().splitlines()) <= 8


def test_cards_of_equal_templates_are_equal_and_name_what_is_unknown(template, tmp_path):
    description = TemplateDescription.of(template, "0" * 64)
    assert template_card(description) == template_card(TemplateDescription.of(template, "0" * 64))
    unknown = tuple(dataclasses.replace(component, reliability=None) for component in description.components)
    assert "Reliability is unknown" in template_card(dataclasses.replace(description, components=unknown))
