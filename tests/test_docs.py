"""Every command that the documentation shows runs, and its tables say what the code does."""

import json
import re
import shlex
from pathlib import Path

import pytest
from api_reference import api_reference
from architectures import architectures_table
from helpers import ROOT
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.cli import main
from fnsft_trl.config import COMBINATIONS


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = {
    "discover": "--ica_max_tokens 200 --ica_components 3 --ica_rank 8 --ica_percentile 80",
    "compare": "--permutations 9",
    "train": "--max_steps 2 --ica_max_tokens 200 --ica_components 3 --ica_rank 8 --max_length 32 --disable_tqdm true",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's bash blocks, comments and continuations resolved."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_make_target_that_is_shown_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert {"demo", "test"} <= shown <= targets


def test_no_command_is_shown_that_is_not_run():
    programs = {words[0] for page in PAGES for words in commands(page)}
    assert programs <= {"make", "fnsft"}


def _adapter(model_dir: Path, directory: Path) -> Path:
    """A saved adapter of the small model."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(base, NeuronTunerConfig(neurons={"0": "1-3"}, task_type="CAUSAL_LM")).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fnsft_command_runs_in_turn(page, model_dir, rows, tmp_path, monkeypatch, hub):
    """As shown, with the model, the data and the amount of work replaced by small local ones."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "second.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:24]))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] != "fnsft" or words[1] == "demo":
            continue
        verb, arguments = words[1], [re.sub("^org/", "alice/", word) for word in words[2:]]
        if verb == "discover":
            arguments[:2] = [str(model_dir), str(data)]
            # QUICK says it again: the last one holds, under one name.
            arguments = [word.replace("--max_tokens", "--ica_max_tokens") for word in arguments]
        if verb == "export":
            arguments[0] = str(_adapter(model_dir, tmp_path / "adapter"))
        if verb == "train":
            arguments += ["--model_name_or_path", str(model_dir), "--dataset_name", str(data)]
            arguments += ["--ica_datasets", str(data), "--use_cpu", "--bf16", "false", "--report_to", "none"]
        if "--texts" in arguments:
            shared = tmp_path / "shared.jsonl"
            shared.write_text(json.dumps({"text": " ".join(row["completion"] for row in rows) * 20}))
            arguments[arguments.index("--texts") + 1] = str(shared)
            arguments += ["--model_a", str(model_dir), "--model_b", str(model_dir)]
        arguments += shlex.split(QUICK.get(verb, ""))
        assert main([verb, *arguments]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page, model_dir, rows, templates, tmp_path, monkeypatch, hub):
    """In turn, in one namespace, with the names of model and data replaced by local ones."""
    from datasets import Dataset
    from helpers import sft_config

    monkeypatch.chdir(tmp_path)
    templates["llama"].save_pretrained("ica_templates")
    data = Dataset.from_list(rows)
    namespace = {
        "dataset": data,
        "validation": data.select(range(8)),
        "general_text": [row["completion"] * 3 for row in rows],
    }
    for block in blocks(page, "python"):
        code = re.sub(r'"[\w.-]+/[\w.-]+-Instruct"', repr(str(model_dir)), block)
        code = code.replace('"org/', '"alice/')
        code = code.replace('SFTConfig(output_dir="output")', "small_config").replace("[0, 3]", "[0, 2]")
        namespace["small_config"] = sft_config(tmp_path / "output")
        exec(compile(code, page.name, "exec"), namespace)


def combinations_table() -> str:
    lines = ["| `mask_mode` | `train_neurons` | what trains |", "|---|---|---|"]
    for (mask_mode, train), (outcome, text) in COMBINATIONS.items():
        lines.append(f"| {mask_mode or 'null'} | {train} | {text if outcome else f'error: {text}'} |")
    return "\n".join(lines)


def test_the_reference_is_that_of_the_docstrings():
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == api_reference(), "run: python tests/api_reference.py > docs/api.md"


def test_the_lines_that_install_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)/", "").replace("--quiet ", "")
    makefile = makefile.replace("$(EMBEDDED)", re.search(r"EMBEDDED := (.*)", makefile)[1])
    lines = "".join(blocks(ROOT / "docs" / "installation.md", "sh")).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line in makefile


def test_the_table_of_architectures_is_that_of_the_tests():
    assert architectures_table() in (ROOT / "docs" / "architectures.md").read_text()


def test_the_table_of_combinations_is_the_one_in_the_code():
    assert combinations_table() in (ROOT / "docs" / "training.md").read_text()
