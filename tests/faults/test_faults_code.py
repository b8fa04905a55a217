"""No code runs from any file that is loaded: each reader is given files that would run some, were they trusted."""

import ast
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import ROOT, sft_config, tiny_model, tiny_rows, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate
from fnsft_trl.cli import main
from fnsft_trl.cli.models import load_model_and_tokenizer
from fnsft_trl.cli.options.loading import LoadingConfig
from fnsft_trl.cli.options.parse import parse_recipe
from fnsft_trl.cli.plans import PlanFile
from fnsft_trl.continual import TaskConfig
from fnsft_trl.continual.tasks import Task
from fnsft_trl.data.sources import load_data
from fnsft_trl.discovery.saved_directions import load_directions
from fnsft_trl.evaluation.evaluated import EvaluatedModel
from fnsft_trl.experiments.cells import Cells
from fnsft_trl.export import to_merged
from fnsft_trl.probes.example_file import Examples
from fnsft_trl.training.checkpoints import mark
from fnsft_trl.training.elastic import EWC_DIR
from fnsft_trl.tuner.saved import SavedAdapter


class Runs:
    """What runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-has-run"


@pytest.fixture
def model(tmp_path):
    """A model with its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path, model):
    """A LoRA of it."""
    tuned = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].base_model_name_or_path = str(model)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(read, *kinds) -> None:
    """Read something that must be refused."""
    with pytest.raises((FNSFTError, *kinds)):
        read()


def test_a_file_that_is_unpickled_would_tell(marker):
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists()


PICKLED = {
    "a template": ("template.safetensors", FunctionalNetworkTemplate.from_pretrained),
    "its description": ("config.json", FunctionalNetworkTemplate.from_pretrained),
    "one of the original": ("global_templates.json", FunctionalNetworkTemplate.from_pretrained),
    "directions": ("directions.safetensors", load_directions),
    "examples": ("examples.json", lambda place: Examples.read(place, tensors_sha256=None, networks=1)),
    "cells": ("cells.jsonl", lambda place: Cells(place / "cells.jsonl")),
    "rows": ("rows.json", lambda place: load_data(str(place / "rows.json"))),
    "rows as parquet": ("rows.parquet", lambda place: load_data(str(place / "rows.parquet"))),
    "a recipe": ("recipe.yaml", lambda place: parse_recipe(str(place / "recipe.yaml"), {})),
    "a plan": ("plan.yaml", lambda place: PlanFile.read(str(place / "plan.yaml"), {})),
}


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("packed", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_a_file_is_refused(name, packed, marker, templates, tmp_path):
    file, read = PICKLED[name]
    templates["llama"].save_pretrained(tmp_path / "place")
    (tmp_path / "place" / "directions.json").write_text('{"format": "fnsft_trl.directions", "format_version": 1}')
    dump = pickle.dump if packed == "pickle" else torch.save
    with (tmp_path / "place" / file).open("wb") as opened:
        dump(Runs(marker), opened)
    refused(lambda: read(tmp_path / "place" / file if file.startswith("global") else tmp_path / "place"))
    assert not marker.exists()


def test_weights_that_are_pickles_are_refused(marker, model, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Runs(marker)}, adapter / "adapter_model.bin")
    refused(lambda: dict(SavedAdapter.read(adapter).tensors))
    refused(lambda: to_merged(adapter, tmp_path / "merged"))
    (model / "model.safetensors").unlink()
    torch.save({"weight": Runs(marker)}, model / "pytorch_model.bin")
    refused(lambda: load_model_and_tokenizer(str(model), LoadingConfig()))
    refused(lambda: EvaluatedModel.find(str(model)).load())
    assert not marker.exists()


CODE = """
import traceback
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).write_text("".join(traceback.format_stack()))


class C(LlamaConfig):
    pass
"""


def plant_code(model: Path, marker: Path) -> None:
    """Let a model name code of its own for everything that can."""
    (model / "own.py").write_text(CODE.format(marker=str(marker)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)) + "generate = print\n")
    kinds = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C", "AutoTokenizer": ["own.C", "own.C"]}
    for file, about in (("config.json", {"model_type": "own"}), ("tokenizer_config.json", {"tokenizer_class": "C"})):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | about | {"auto_map": kinds}))


def test_code_of_a_model_runs_only_where_that_is_said(marker, model, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked at a terminal either
    plant_code(model, marker)
    for read in (
        lambda: load_model_and_tokenizer(str(model), LoadingConfig()),
        lambda: EvaluatedModel.find(str(model)).load(),
        lambda: EvaluatedModel.find(str(adapter)).load(),
        lambda: to_merged(adapter, tmp_path / "merged"),
    ):
        refused(read)
        assert not marker.exists(), marker.read_text()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(tiny_rows(2)[0]))
    words = ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *words, "--use_cpu", "--bf16", "false", "--report_to", "none"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists(), marker.read_text()
    with suppress(Exception):
        load_model_and_tokenizer(str(model), LoadingConfig(trust_remote_code=True))
    assert marker.exists()  # what was planted is code that would have run


def test_an_adapter_imports_no_module_that_it_names(marker, adapter, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    file = adapter / "adapter_config.json"
    about = {"auto_mapping": {"parent_library": "evil_module", "base_model_class": "C"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    found = EvaluatedModel.find(str(adapter))
    found.load()
    to_merged(adapter, tmp_path / "merged")
    assert "evil_module" not in sys.modules
    assert not marker.exists()


YAML = "!!python/object/apply:os.system ['touch {marker}']"


def test_a_tag_that_is_trusted_would_tell(marker):
    yaml.unsafe_load(YAML.format(marker=marker))
    assert marker.exists()


@pytest.mark.parametrize("key", ["learning_rate", "arms", "tasks", "data", "model_init_kwargs"])
def test_tags_of_yaml_are_refused(key, marker, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(f"{key}: {YAML.format(marker=marker)}\n")
    for read in (lambda: parse_recipe(str(path), {}), lambda: PlanFile.read(str(path), {})):
        refused(read)
    for verb in ("experiment", "continual", "discover", "probe"):
        assert main([verb, "--config", str(path)]) == 2
    assert not marker.exists()


TEMPLATES = [
    "cycler.__init__.__globals__.os.system('touch {marker}')",
    "messages.__class__.__mro__[1].__subclasses__()",
]


@pytest.mark.parametrize("code", TEMPLATES)
def test_chat_templates_reach_nothing_but_their_rows(code, marker, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ " + code.format(marker=marker) + " }}"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]

    def train():
        FNSFTTrainer(
            tiny_model("llama"),
            sft_config(tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    refused(train, Exception)
    assert not marker.exists()


def test_a_script_in_the_folder_of_a_dataset_is_not_run(marker, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(CODE.format(marker=str(marker)))
    refused(lambda: load_data(str(folder)))
    refused(lambda: load_data(str(folder / "data.py")))
    (folder / "rows.jsonl").write_text(json.dumps({"text": "x"}))
    refused(lambda: load_data(str(folder)))
    (folder / "data.py").rename(folder / "other.py")
    assert load_data(str(folder), split="train")["text"] == ["x"]
    assert not marker.exists()


def test_the_prompt_of_a_task_is_filled_with_columns_and_nothing_else(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "x", "a.b": "y", "label": "z"}] * 4))
    made = {"dataset": str(tmp_path / "rows.json"), "test_split": "train", "answer": "{label}"}
    for prompt in ("{text:>999999999999}", "{text!r}", "{text:{label}}", "{}", "{text} {}"):
        with pytest.raises(FNSFTError, match="braces hold the name of a column and nothing else"):
            TaskConfig(**made, prompt=prompt)
    for prompt in ("{text.__class__}", "{text[0]}"):
        with pytest.raises(FNSFTError, match="has no column"):
            Task.read("t", TaskConfig(**made, prompt=prompt))
    task = Task.read("t", TaskConfig(**made, prompt="{{ {text} {a.b} }}"))
    assert {row["prompt"] for row in task.train} == {"{ x y }"}


def test_tasks_of_lm_eval_are_data_unless_they_are_trusted(marker, tmp_path):
    pytest.importorskip("lm_eval")
    from fnsft_trl.evaluation.harness import Tasks

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(marker=str(marker)) + "def f(doc): return ''\n")
    plain = "task: mine\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\n"
    (tmp_path / "elsewhere.yaml").write_text("doc_to_text: !function tasks/own.f\n")
    for more in ("doc_to_text: !function own.f\n", "include: ../elsewhere.yaml\n", "include: [../elsewhere.yaml]\n"):
        (folder / "mine.yaml").write_text(plain + more)
        with pytest.raises(FNSFTError, match="brings code of its own"):
            Tasks(["mine"], str(folder))
    assert not marker.exists()
    assert Tasks(["mine"], str(folder), trusts=True).names == ["mine"]
    (folder / "mine.yaml").write_text(plain + "doc_to_text: '{{question}}'\n")
    assert Tasks(["mine"], str(folder)).names == ["mine"]


@pytest.mark.slow
def test_a_checkpoint_of_others_runs_nothing_when_a_training_goes_on_from_it(marker, templates, tmp_path):
    def trainer():
        return FNSFTTrainer(
            tiny_model("llama"),
            sft_config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1),
            train_dataset=Dataset.from_list(tiny_rows(8)),
            processing_class=tiny_tokenizer(),
            network_config=FunctionalNetworkConfig(ica_fraction=0.3),
            network_template=templates["llama"],
        )

    trainer().train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    about = json.loads((checkpoint / "functional_networks" / "complete.json").read_text())["record"]["run"]
    shutil.copytree(checkpoint, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "whole", checkpoint)
        torch.save({"state": Runs(marker)}, checkpoint / name)
        mark(checkpoint, about)  # as one who means it would
        if name == "training_args.bin":  # which nothing reads
            trainer().train(resume_from_checkpoint=str(checkpoint))
        else:
            refused(lambda: trainer().train(resume_from_checkpoint=str(checkpoint)), pickle.UnpicklingError)
        assert not marker.exists(), name


def test_what_earlier_tasks_left_for_ewc_is_no_pickle(marker, tmp_path):
    from fnsft_trl.training import elastic

    (tmp_path / EWC_DIR).mkdir()
    with (tmp_path / EWC_DIR / elastic._FILE).open("wb") as opened:
        pickle.dump(Runs(marker), opened)
    refused(lambda: elastic._load(tmp_path))
    assert not marker.exists()


# Calls that run what they are given, by the last part of their name, and where they may stand.
RUNS = ("eval", "exec", "compile", "__import__", "unsafe_load", "full_load", "system", "popen", "loads_pickle")
UNSAFE = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def calls():
    """(module, its name, the call) of every call in the package."""
    for path in sorted((ROOT / "fnsft_trl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_no_call_of_this_package_runs_what_it_reads():
    for module, name, call in calls():
        owner, _, last = name.rpartition(".")
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        is_method = bool(owner) and last in ("eval", "compile") and owner not in ("builtins", "torch.jit")
        assert is_method or last not in RUNS, (module, name)  # model.eval(), re.compile()
        assert name not in ("torch.load", "torch.jit.load", "np.load", "numpy.load", "torch.package"), (module, name)
        assert not (owner == "yaml" and last.startswith("load")), (module, name)
        assert given.get("trust_remote_code") != "True", (module, name)
        assert given.get("weights_only") != "False", (module, name)
        assert given.get("allow_pickle") != "True", (module, name)
        assert given.get("shell") != "True", (module, name)


def test_this_package_imports_nothing_that_unpickles():
    for path in (ROOT / "fnsft_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not UNSAFE & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE:
                assert {alias.name for alias in node.names} <= {"PicklingError", "UnpicklingError"}, path
