"""`protect` from the command line and YAML, directions found alone, and every misuse."""

import json

import pytest
from hub import ORG

from fnsft_trl.cli import main
from fnsft_trl.cli.options.parse import parse_options
from fnsft_trl.discovery.saved_directions import load_directions
from fnsft_trl.errors import FNSFTError


WORDS = ["--model_name_or_path", "m", "--dataset_name", "d"]
GIVEN = ["--protect", "subspace", "--protect_datasets", "wiki=embedded", "law=law.txt", "--protect_dims", "0.99"]


def test_a_file_and_the_command_line_mean_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "protect: subspace\nprotect_datasets: [wiki=embedded, law=law.txt]\nprotect_dims: 0.99\n"
        "protect_shares: [3, 1]\n"
    )
    asked = parse_options([*WORDS, *GIVEN, "--protect_shares", "3", "1"])
    assert asked.protection == parse_options([*WORDS, "--config", str(tmp_path / "a.yaml")]).protection
    assert asked.protection.shares() == {"wiki": 0.75, "law": 0.25}
    assert asked.network_config is None
    assert parse_options(WORDS).protection is None
    assert parse_options([*WORDS, "--protect", "none"]).protection is None


def test_forgetting_low_is_the_recommended_protection_and_never_a_default(tmp_path):
    asked = parse_options([*WORDS, "--forgetting", "low"])
    assert asked.network_config is None  # nothing is discovered for it
    found = asked.protection
    assert (found.protect, found.protect_datasets, found.sources()) == (
        *("subspace", ["embedded"]),
        {"embedded": "embedded"},
    )
    assert [found.leading_of(width) for width in (64, 576, 4096)] == [32, 200, 200]
    (tmp_path / "a.yaml").write_text("forgetting: low\nprotect_datasets: [mine=chats.jsonl, old=old.jsonl]\n")
    given = parse_options([*WORDS, "--config", str(tmp_path / "a.yaml")]).protection
    assert list(given.sources()) == ["mine", "old"]
    for word in ("protect=subspace", "protect_datasets=mine=chats.jsonl old=old.jsonl", "each input 200 "):
        assert word in given.chosen()
    for words in ([], ["--ica_fraction", "0.1"], ["--forgetting", "null"]):
        assert parse_options([*WORDS, *words]).protection is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forgetting", "lo"], "did you mean 'low'"),
        (["--forgetting", "low", "--protect", "none"], "protect=none does not"),
        (["--forgetting", "low", "--protect", "random"], "chooses protect itself, and random was given"),
        (["--forgetting", "low", "--protect_dims", "9"], "chooses protect_dims itself, and 9"),
        (["--forgetting", "low", "--protect_strength", "0.5"], "chooses protect_strength itself"),
        (["--forgetting", "low", "--protect_basis", "d"], "chooses protect_basis itself"),
        (["--protect", "networks"], "protect=networks needs a template"),
        (["--protect", "subspaces"], "did you mean 'subspace'"),
        ([*GIVEN, "--protect_strength", "1.5"], "protect_strength is 1.5"),
        (["--protect_dims", "3"], "protect_dims has no effect without protect"),
    ],
)
def test_misuse_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(FNSFTError, match=message):
        parse_options([*WORDS, *words])


def test_directions_found_alone_are_pushed_and_protect_a_run(model_dir, rows, tmp_path, monkeypatch, capsys, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", ORG)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:16]))
    (tmp_path / "wiki.txt").write_text("The red fox went to the sea\nSay nothing.\n" * 9)
    find = ["discover", str(model_dir), "wiki.txt", "--basis_only", "--output_dir", "found"]
    assert main([*find, "--ica_components", "3"]) == 2
    assert "ica_components has no effect with basis_only" in capsys.readouterr().err
    assert main([*find, "--ica_store_basis", "3", "--push_to_hub", "org/basis"]) == 0
    assert "Pushed to" in capsys.readouterr().out
    kept, about = load_directions("found")
    assert about["leading"] == 3
    assert {each.basis.shape[1] for each in kept.inputs} == {5}
    train = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", "data.jsonl", "--max_steps", "1"]
    train += ["--output_dir", "out", "--max_length", "32", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    train += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--protect",
        "subspace",
        "--protect_basis",
        "org/basis",
    ]
    assert main(train) == 0
    told = json.loads((tmp_path / "out" / "results.json").read_text())["protection"]
    assert (told["protect"], told["most"]) == ("subspace", 5)
    assert told["left"] < 1e-6
    assert "Protected directions" in (tmp_path / "out" / "README.md").read_text()
