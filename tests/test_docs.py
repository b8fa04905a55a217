"""Every command that the documentation shows runs, and its tables say what the code does."""

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from api_reference import api_pages
from architectures import architectures_table
from helpers import ROOT, instead, tiny_rows, write_converter
from hub import ORG
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, trainer

import fnsft_trl
from fnsft_trl import FunctionalNetworkConfig, NeuronTunerConfig, discover_networks
from fnsft_trl.cli import VERBS, main
from fnsft_trl.cli.options.arguments import read_arguments
from fnsft_trl.cli.options.loading import loading_options
from fnsft_trl.cli.options.parse import parse_options
from fnsft_trl.cli.plans import PlanFile
from fnsft_trl.config import COMBINATIONS
from fnsft_trl.export.gguf import CONVERTER_VARIABLE
from fnsft_trl.training.protection_config import EVIDENCE


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROLES = {"user": "prompt", "assistant": "completion"}
QUICK = {
    "discover": "--ica_max_tokens 200 --ica_components 3 --ica_rank 8 --ica_percentile 80",
    "compare": "--permutations 9",
    "evaluate": "--bootstrap_draws 100",
    "probe": "--max_tokens 300 --max_length 32 --draws 3 --batch_size 16 --prompts 1",
    "continual": "--max_steps 1 --seeds 0 --orders forth --arms lora --max_length 256 --disable_tqdm true "
    "--retention_tokens 50 --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct",
    "experiment": "--max_steps 2 --ica_max_tokens 200 --ica_components 3 --ica_component_ids 0-2 --ica_rank 8 "
    "--ica_percentile 80 --max_length 64 --disable_tqdm true --retention_tokens 50 --jobs 1 --use_cpu true",
    "restore": "--keep_tokens 200 --score_tokens 100 --leading 2 4",
    "train": "--max_steps 2 --ica_max_tokens 200 --ica_components 3 --ica_rank 8 --max_length 32 --disable_tqdm true",
}

CHATS = [
    {"source": "made here", "messages": [{"role": role, "content": row[key]} for role, key in ROLES.items()]}
    for row in tiny_rows(40)
]
PAIRS = [
    {
        "chosen": row["messages"],
        "rejected": [row["messages"][0], {"role": "assistant", "content": row["messages"][1]["content"][::-1]}],
    }
    for row in CHATS[:8]
]
# The data that the documentation names: their files below the working directory.
FILES = {
    "trl-lib/ultrafeedback_binarized/train.jsonl": PAIRS,
    "trl-lib/kto-mix-14k/train.jsonl": [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "label": number % 2 == 0}
        for number, row in enumerate(CHATS[:8])
    ],
    "trl-lib/DeepMath-103K/train.jsonl": [{"prompt": row["messages"][:1]} for row in CHATS[:4]],
    "trl-lib/Capybara/train.jsonl": CHATS[:30],
    "trl-lib/Capybara/test.jsonl": CHATS[30:],
    "roneneldan/TinyStories/train.jsonl": [{"text": row["prompt"] * 60} for row in tiny_rows(100)],
    "roneneldan/TinyStories/validation.jsonl": [{"text": row["completion"] * 40} for row in tiny_rows(200)],
    "tasks/sky.jsonl": [{"question": "Sky?", "choices": ["ba", "ko ri"], "answer": n % 2} for n in range(9)],
    "first.jsonl": tiny_rows(24),
    "second.jsonl": tiny_rows(24, seed=1),
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


def _lora(model_dir: Path, directory: Path) -> Path:
    """A LoRA of the small model that has learnt the rows of `first.jsonl`, saved with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    modules = ["gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    rows = [row["prompt"] + row["completion"] + "<eos>" for row in FILES["first.jsonl"]]
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(20):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tuned(model_dir: Path, directory: Path) -> Path:
    """The same as a whole model."""
    adapter = _lora(model_dir, directory / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter)
    model.merge_and_unload().save_pretrained(directory / "merged")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory / "merged")
    return directory / "merged"


@pytest.fixture
def workplace(tmp_path, monkeypatch, model_dir, hub):
    """A working directory in which the names that the documentation gives are those of tiny models and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", ORG)  # of one who may write to org/...
    write_converter(tmp_path / "convert")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "convert"))
    for name in ("meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        Path(name).parent.mkdir(parents=True)
        Path(name).symlink_to(model_dir)
    for file, rows in FILES.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("\n".join(json.dumps(row) for row in rows))
    page = (ROOT / "docs" / "evaluation.md").read_text()
    shown = page.partition("where `tasks/sky.yaml` is\n\n")[2].partition("\n\n")[0]
    Path("tasks/sky.yaml").write_text(textwrap.dedent(shown))
    Path("recipes").symlink_to(ROOT / "recipes")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fnsft_command_runs_in_turn(page, workplace, model_dir, forked):
    """As shown, with the model, the data and the amount of work replaced by small local ones."""
    data = str(workplace / "second.jsonl")
    for words in commands(page):
        if words[0] != "fnsft" or words[1] == "demo":
            continue
        verb, arguments = words[1], words[2:]
        if verb == "discover":
            arguments[:2] = [str(model_dir), data]
            arguments = [word.replace("--max_tokens", "--ica_max_tokens") for word in arguments]
        if verb == "probe":
            arguments[0] = str(model_dir)
        if verb == "export":
            arguments[0] = str(_adapter(model_dir, workplace / "adapter"))
        if verb == "restore":
            tuned = "--base" in arguments
            arguments[0] = str((_tuned if tuned else _lora)(model_dir, workplace / f"lora-{tuned}"))
            arguments += ["--tolerance", "0.5"] if "--task" in arguments else []
        if verb == "evaluate" and "--retention_datasets" in arguments:
            arguments = instead(arguments, "--retention_tokens", "200")
        if verb == "train":
            small = ["--model_name_or_path", str(model_dir), "--dataset_name", data, "--ica_datasets", data]
            arguments = [*instead(arguments, *small), "--use_cpu", "--bf16", "false", "--report_to", "none"]
            if "--protect" in arguments:
                arguments = instead(arguments, "--protect_dims", "3", "--protect_tokens", "100")
            if "--forgetting" in arguments:
                arguments = instead(arguments, "--protect_tokens", "100", "--retention_tokens", "100")
        if verb == "experiment":
            arguments = instead(arguments, "--model_name_or_path", str(model_dir), "--dataset_name", data)
            arguments += ["--data", "first.jsonl", "--ica_datasets", data, "--retention_datasets", f"general={data}"]
        if "--seeds" in arguments:
            arguments = instead(arguments, "--seeds", "0", "1")
        if "--texts" in arguments:
            arguments = instead(arguments, "--texts", "roneneldan/TinyStories", "--model_a", str(model_dir))
            arguments += [] if "--per_sample" in arguments else ["--model_b", str(model_dir)]
        is_plain = {"--basis_only", "--per_sample"} & set(arguments)  # finds no networks, or permutes none
        quick = "" if is_plain else QUICK.get(verb, "")
        assert main([verb, *instead(arguments, *shlex.split(quick))]) == 0, words


def snippets() -> list:
    """Every Python block of every page, both sides of every diff, and the example of every docstring."""
    found = []
    for page in PAGES:
        code = blocks(page, "python")
        for diff in blocks(page, "diff"):
            code += [_side(diff, mark) for mark in "-+"]
        code += [_of_prompts(example) for example in blocks(page, "pycon")]
        found += [pytest.param(block, id=f"{page.name}-{number}") for number, block in enumerate(code)]
    return found


def _side(diff: str, mark: str) -> str:
    """What stands there before (`-`) or after (`+`) a change."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", mark)) + "\n"


def _of_prompts(example: str) -> str:
    """The code of a session, which says itself what comes out."""
    lines = []
    for part in doctest.DocTestParser().get_examples(example):
        lines.append(f"assert ({part.source.strip()}) == ({part.want.strip()})\n" if part.want else part.source)
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets())
def test_every_snippet_runs_as_it_is_printed(code, workplace, template_of_ten, monkeypatch):
    """Alone, with nothing defined before it. What is tiny is the model and the data of that name, and what is short
    every training."""
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, _Soon])
    template_of_ten.save_pretrained("ica_templates")
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


class _Soon(TrainerCallback):
    """Ends a training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.fixture(scope="module")
def template_of_ten(model_dir):
    """Ten networks of the tiny model, as many as a discovery finds by default."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    texts = [row["text"] for row in FILES["roneneldan/TinyStories/validation.jsonl"]]
    return discover_networks(model, tokenizer, texts, FunctionalNetworkConfig(ica_percentile=80, ica_max_tokens=2000))


def test_there_are_snippets_of_every_kind():
    code = [snippet.values[0] for snippet in snippets()]
    assert len(code) >= 10
    assert any("SFTTrainer(" in block and "fnsft_trl" not in block for block in code)  # what the diff takes away
    assert any(block.startswith("assert") or "\nassert" in block for block in code)
    assert not [block for block in code if "# doctest" in block or "..." in block]


def yaml_blocks() -> list:
    """Every YAML file that is shown or brought; its first line says what it is for."""
    shown = {f"{page.name}-{n}": block for page in PAGES for n, block in enumerate(blocks(page, "yaml"))}
    brought = {path.name: path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    brought |= {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("peft_vs_peft_ica", "probes")
        for path in sorted((ROOT / "recipes" / folder).rglob("*.yaml"))
    }
    return [pytest.param(text, id=name) for name, text in (shown | brought).items()]


@pytest.mark.parametrize("text", yaml_blocks())
def test_every_yaml_file_is_one_that_its_command_takes(text, workplace):
    program, verb, *words = text.splitlines()[0].removeprefix("# ").split()
    Path("config.yaml").write_text(text)
    if verb == "continual":
        assert PlanFile.read("config.yaml", {}).arms
        return
    assert (program, words[0]) == ("fnsft", "--config")
    words[1] = "config.yaml"
    if verb == "train":
        asked = parse_options(words)
        assert asked.network_config is not None or asked.values["use_peft"]
        assert not asked.notes
    else:
        assert read_arguments(words, import_module(f"fnsft_trl.cli.{verb}").options()).given


def combinations_table() -> str:
    lines = ["| `mask_mode` | `train_neurons` | what trains |", "|---|---|---|"]
    for (mask_mode, train), (outcome, text) in COMBINATIONS.items():
        lines.append(f"| {mask_mode or 'null'} | {train} | {text if outcome else f'error: {text}'} |")
    return "\n".join(lines)


def test_the_reference_is_that_of_the_docstrings():
    written = {path.name: path.read_text() for path in (ROOT / "docs" / "api").iterdir()}
    assert written == api_pages(), "run: python tests/api_reference.py"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """No link or anchor is dead, and every page is reached."""
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/forgetting/README.md"])
def test_no_link_of_a_page_outside_of_the_site_is_dead(page):
    page = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    assert links
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_the_lines_that_install_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)/", "").replace("--quiet ", "")
    makefile = makefile.replace("$(EMBEDDED)", re.search(r"EMBEDDED := (.*)", makefile)[1])
    lines = "".join(blocks(ROOT / "docs" / "installation.md", "sh")).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line in makefile


def test_the_job_of_all_systems_installs_so_too_and_needs_no_make():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]["platforms"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["os"]} == {"ubuntu", "macos", "windows"}
    lines = [step["run"].replace(".[test]", ".[test,quality]") for step in job["steps"] if "run" in step]
    assert lines[:-1] == "".join(blocks(ROOT / "docs" / "installation.md", "sh")).splitlines()
    assert lines[-1].startswith("python -m pytest ")


def test_the_changelog_has_a_section_for_the_version_and_dates_that_of_a_release():
    text = (ROOT / "CHANGELOG.md").read_text()
    version = re.escape(fnsft_trl.__version__)
    heading = r"\[Unreleased\]" if "dev" in version else rf"\[{version}\] - \d{{4}}-\d\d-\d\d"
    assert re.search(rf"^## {heading}$", text, flags=re.MULTILINE)


def test_the_oldest_versions_that_are_named_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    named = (
        (ROOT / "docs" / "installation.md").read_text().partition("the oldest that work: ")[2].partition(". `make")[0]
    )
    found = dict(item.split() for item in " ".join(named.split()).split(", "))
    assert found == {name: floors[name.lower()] for name in found}
    assert {"trl", "peft", "transformers", "accelerate", "torch"} <= {name.lower() for name in found}
    assert project["requires-python"] == ">=3.11"


def test_the_table_of_architectures_is_that_of_the_tests():
    assert architectures_table() in (ROOT / "docs" / "architectures.md").read_text()


def test_the_page_on_forgetting_says_what_the_log_says_and_the_verdict_of_the_study():
    page = (ROOT / "docs" / "forgetting.md").read_text()
    assert EVIDENCE in " ".join(page.replace("\n> ", " ").split())
    report = (ROOT / "benchmarks" / "forgetting" / "results" / "report.md").read_text()
    verdict = report.partition("## Verdict\n\n")[2].partition("\n\n## ")[0]
    assert "Q1:" in verdict
    assert "\n".join(f"> {line}".rstrip() for line in verdict.splitlines()) in page


def test_the_table_and_pictures_of_the_study_are_those_of_its_cells():
    results = ROOT / "benchmarks" / "forgetting" / "results"
    report = (results / "report.md").read_text()
    table = re.search(r"^## At equal learning\n.*?\n(\|.*?\n)\n", report, flags=re.MULTILINE | re.DOTALL)[1]
    assert table.count("\n") > 7
    for page in ("README.md", "docs/forgetting.md"):
        assert table in (ROOT / page).read_text(), page
    for name, task in (("forgetting_study", "routing"), ("forgetting_study_german", "german")):
        committed = results / f"confirmation-{task}-all-linear-layers.png"
        assert (ROOT / "docs" / "images" / f"{name}.png").read_bytes() == committed.read_bytes()


def test_ratios_that_are_quoted_are_in_the_report_of_the_study():
    report = (ROOT / "benchmarks" / "forgetting" / "results" / "report.md").read_text()
    ratio = r"\b0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]"
    quoted = re.findall(ratio, EVIDENCE) + re.findall(ratio, (ROOT / "README.md").read_text())
    assert len(quoted) > 4
    assert set(quoted) <= set(re.findall(ratio, report))


def test_the_table_of_combinations_is_the_one_in_the_code():
    assert combinations_table() in (ROOT / "docs" / "training.md").read_text()


def test_the_table_of_verbs_is_that_of_the_command():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert "\n".join(f"| `fnsft {verb}` | {text} |" for verb, text in VERBS.items()) in page
    assert all(f"`{verb}`" in (ROOT / "README.md").read_text() for verb in VERBS)


def test_the_table_of_loading_names_every_option_that_loads():
    page = (ROOT / "docs" / "commands.md").read_text().partition("## Loading a model")[2]
    for option in loading_options():
        assert re.search(rf"^\| .*`{option.name}`.* \|", page, flags=re.MULTILINE), option.name


def test_the_values_that_the_page_shows_are_read_so(tmp_path):
    """What the two tables of values say, of the option types and of values that belong to none."""
    shown = next(block for block in blocks(ROOT / "docs" / "commands.md", "yaml") if "fnsft train" in block)
    (tmp_path / "config.yaml").write_text(shown)
    asked = parse_options(["--config", str(tmp_path / "config.yaml"), "--ica_template_path", "t"])
    assert asked.values["run_name"] == "007"
    assert asked.values["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert asked.values["model_init_kwargs"] == {"low_cpu_mem_usage": True}
    assert (asked.network_config.ica_layers, asked.network_config.ica_component_ids) == ("1:4", "5:")
