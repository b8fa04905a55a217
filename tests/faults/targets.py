"""What reads files of others, each with valid inputs: what `fuzz.py` changes them for."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from faults.mutations import mutated, with_another_value


@dataclass(frozen=True)
class Target:
    """
    Something that reads what others have written.

    Attributes:
        seeds (`list[bytes]`): valid inputs.
        read (`Callable`): reads one input, given as bytes and a folder to put it into.
        is_json (`bool`): whether inputs are JSON, and are changed as such half of the time.
        share (`float`): of all executions.
    """

    seeds: list[bytes]
    read: Callable[[bytes, Path], object]
    is_json: bool = True
    share: float = 0.02

    def input(self, draw: random.Random) -> bytes:
        """A changed input."""
        data = draw.choice(self.seeds)
        if self.is_json and draw.random() < 0.5:
            return json.dumps(with_another_value(json.loads(data), draw)).encode("utf-8", "surrogatepass")
        return mutated(data, self.seeds, draw)


def targets(folder: Path) -> dict[str, Target]:
    """All of them, with inputs that this version writes and reads."""
    return _templates(folder) | _words() | _rows() | _runs(folder) | _findings(folder)


def _templates(folder: Path) -> dict[str, Target]:
    from helpers import ROOT, tiny_model, tiny_rows, tiny_tokenizer

    from fnsft_trl import FunctionalNetworkConfig, discover_networks
    from fnsft_trl.template.legacy import LEGACY_FILE
    from fnsft_trl.template.template import FunctionalNetworkTemplate

    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    template = discover_networks(tiny_model("llama"), tiny_tokenizer(), [r["prompt"] for r in tiny_rows(50)], config)
    template.save_pretrained(folder / "template")
    golden = ROOT / "tests" / "golden" / "templates"
    configs = [path.read_bytes() for path in (folder / "template" / "config.json", *golden.glob("*/config.json"))]
    tensors = [(folder / "template" / "template.safetensors").read_bytes()]
    legacy = [path.read_bytes() for path in ROOT.glob(f"tests/golden/**/{LEGACY_FILE}")]
    legacy += [b'{"0": [[0, 1], [2]], "1": [[3], [0, 4]]}']

    def read_template(name: str):
        def read(data: bytes, place: Path) -> None:
            for file in (folder / "template").iterdir():
                (place / file.name).write_bytes(data if file.name == name else file.read_bytes())
            FunctionalNetworkTemplate.from_pretrained(place)

        return read

    def read_legacy(data: bytes, place: Path) -> None:
        (place / LEGACY_FILE).write_bytes(data)
        FunctionalNetworkTemplate.from_pretrained(place / LEGACY_FILE)

    return {
        "template description": Target(configs, read_template("config.json"), share=0.1),
        "template tensors": Target(tensors, read_template("template.safetensors"), is_json=False, share=0.08),
        "original's templates": Target(legacy, read_legacy, share=0.1),
    }


_COMMANDS = [
    "discover embedded rows.jsonl --output_dir out --ica_components 5 --ica_layers 0-5,9 --ica_fraction=0.5",
    "inspect networks --name 3=dates 4=years --html page.html",
    "compare one two --texts rows.jsonl --device_map auto",
    "evaluate a b --data text=rows.jsonl --mask_mode lesion --ica_template_path networks --no_generate",
    "probe embedded networks --data rows=rows.jsonl --max_tokens 60 --draws 3 --networks 0-1 --curves lesion dose",
    "experiment recipes --seeds 0 1 --jobs 2 --learning_rate 1e-4",
    "continual plan.yaml --orders order1 --arms lora --max_steps 5",
    "restore adapter --keep a=x.jsonl b=y.jsonl --leading 2 4 --scales 0.5 --layers 0-3",
    "export run --to baked --output_dir out --mask_mode amplify --mask_factor 2 --verify",
    "recipes copy lora",
]
_TRAIN = [
    "train --model_name_or_path embedded --dataset_name rows.jsonl --use_peft --lora_r 4 --max_steps 4 --bf16 false",
    "train --model_name_or_path embedded --dataset_name rows.jsonl --ica_fraction 0.2 --mask_mode lesion "
    "--train_neurons unselected --retention_datasets wiki=text.jsonl --retention_budget 0.1",
    "train --model_name_or_path embedded --dataset_name_or_path org/rows --no_peft --ica_component_ids [0,1]",
]


def _words() -> dict[str, Target]:
    """Command lines, ranges, and the files of YAML that commands name."""
    from continual.small_study import SHARED, TASKS
    from helpers import ROOT

    from fnsft_trl.cli import experiment
    from fnsft_trl.cli.options.arguments import read_arguments
    from fnsft_trl.cli.options.parse import parse_options, parse_recipe
    from fnsft_trl.cli.plans import PlanFile
    from fnsft_trl.cli.recipe_arms import find_recipes
    from fnsft_trl.ranges import parse_ranges

    specs = [b"0-5,9", b"1:4", b"all", b"0", b"3-", b":2", b"-1", b"0,2,4", b"1-3,5:9"]
    recipes = [path.read_bytes() for path in (ROOT / "recipes").glob("*.yaml")]
    task = {"dataset": "org/rows", "prompt": "Topic? {text}", "answer": "{label}", "labels": {"0": "a", "1": "b"}}
    tasks = {name: {**task, "scorer": "choice", "test_rows": 6} for name in TASKS}
    ways = {"lora": {"use_peft": True, "lora_r": 2}, "ewc": {"learning_rate": 1e-3, "ewc": 100.0, "replay": 0.25}}
    own = {"model_name_or_path": "embedded", "orders": {"order1": list(TASKS)}, "seeds": [0, 1], "arms": ways}
    plan = {**own, "tasks": tasks, **SHARED}
    settings = {"data": ["test.jsonl"], "seeds": [0, 1], "jobs": 2, "generate": True, "learning_rate": "1e-4"}

    def read_spec(data: bytes, place: Path) -> None:
        parse_ranges(data.decode("utf-8", "replace"), 32)

    def read_recipe(data: bytes, place: Path) -> None:
        (place / "recipe.yaml").write_bytes(data)
        parse_recipe(str(place / "recipe.yaml"), {})

    def read_plan(data: bytes, place: Path) -> None:
        (place / "plan.yaml").write_bytes(data)
        PlanFile.read(str(place / "plan.yaml"), {})

    def read_tasks(data: bytes, place: Path) -> None:
        (place / "tasks.yaml").write_bytes(data)
        read_plan(json.dumps({**own, "tasks": ["tasks.yaml"], **SHARED}).encode(), place)

    def read_experiment(data: bytes, place: Path) -> None:
        (place / "experiment.yaml").write_bytes(data)
        (place / "arm.yaml").write_bytes(recipes[0])
        _, shared = find_recipes([str(place)])
        read_arguments([str(place), "--config", str(shared)], experiment.options())

    def read_command(data: bytes, place: Path) -> None:
        verb, *words = _texts(data) or ["recipes"]
        if verb == "train":
            parse_options(words)
        elif verb in {line.split()[0] for line in _COMMANDS}:
            read_arguments(words, import_module(f"fnsft_trl.cli.{verb}").options())

    commands, train = ([json.dumps(line.split()).encode() for line in lines] for lines in (_COMMANDS, _TRAIN))
    return {
        "layers": Target(specs, read_spec, is_json=False, share=0.2),
        "recipes": Target(recipes, read_recipe, is_json=False),
        "plans": Target([json.dumps(plan).encode()], read_plan, share=0.01),
        "task files": Target([json.dumps(tasks).encode()], read_tasks, share=0.01),
        "experiment files": Target([json.dumps(settings).encode()], read_experiment, share=0.01),
        "command lines": Target(commands, read_command, share=0.02),
        "command lines of train": Target(train, read_command, share=0.01),
    }


def _texts(data: bytes) -> list[str]:
    """The words of a command line; none where an input is no list of words."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return []
    is_list = isinstance(found, list) and found and all(isinstance(each, str) for each in found)
    # What a shell can give: no character 0, and bytes that are no UTF-8 as lone surrogates.
    return found if is_list and not any("\0" in each for each in found) else []


def _rows() -> dict[str, Target]:
    from helpers import ROOT

    from fnsft_trl import FNSFTError, to_trl_format
    from fnsft_trl.continual import tasks
    from fnsft_trl.continual.task_config import TaskConfig

    rows = [line.encode() for line in (ROOT / "tests" / "rows" / "catalogue.jsonl").read_text().splitlines()]
    rows = [json.dumps(json.loads(row)["row"]).encode() for row in rows]
    config = {
        "prompt": "Topic? {text} {more}",
        "answer": "{label}",
        "labels": {"0": "a", "1": "b"},
        "scorer": "choice",
    }
    of_task = {"config": config, "rows": [{"text": "x", "more": None, "label": n % 2} for n in range(4)]}

    def read_row(data: bytes, place: Path) -> None:
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict):
            to_trl_format([row])

    def read_task(data: bytes, place: Path) -> None:
        """A task with its rows, as they come out of a dataset."""
        from datasets import Dataset
        from pyarrow import ArrowException

        try:
            found = json.loads(data)
            part, config = Dataset.from_list(found["rows"]), found["config"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, ArrowException):
            return
        try:
            asked = TaskConfig(dataset="x", train_split="a", test_split="a", **config)
        except TypeError:  # what is no mapping, or names no field, is met where files are read
            return
        labels = asked.labels
        if all(name in part.column_names for name in asked.columns) and len(part):
            list(tasks._rows(part, asked, labels))
        else:
            raise FNSFTError("the columns are checked where the data are loaded")

    return {
        "rows": Target(rows, read_row, share=0.2),
        "task rows": Target([json.dumps(of_task).encode()], read_task, share=0.02),
    }


def _runs(folder: Path) -> dict[str, Target]:
    """What runs and experiments have written, with which others go on."""
    from helpers import ROOT, tiny_model

    from fnsft_trl.evaluation.evaluated import read_record, recorded_neurons
    from fnsft_trl.experiments.arms import Arm
    from fnsft_trl.experiments.cells import Cells
    from fnsft_trl.export.adapter import delta_mask
    from fnsft_trl.neurons.sites import find_neuron_sites
    from fnsft_trl.occupied import REPORT, check_target
    from fnsft_trl.template.storage import NETWORK_DIR, SELECTION_FILE
    from fnsft_trl.training.checkpoints import MARKER_FILE, damage, mark
    from fnsft_trl.tuner import NeuronTunerConfig
    from fnsft_trl.tuner.saved import SavedAdapter

    golden, model = ROOT / "tests" / "golden", tiny_model("llama")
    cells = (ROOT / "benchmarks" / "forgetting" / "cells.jsonl").read_bytes().splitlines()[:3]
    found = [json.loads(cell) for cell in cells]
    arms = [Arm(cell["arm"], cell["task"], None, cell.get("settings", {})) for cell in found]
    runs = [golden / "runs" / name for name in ("deltas", "full-lesion")]
    records = [(run / NETWORK_DIR / SELECTION_FILE).read_bytes() for run in runs]
    checkpoint = folder / "checkpoint-2"
    shutil.copytree(golden / "runs" / "deltas" / "checkpoint-2", checkpoint)
    mark(checkpoint, {"options": {"learning_rate": 1e-3}})
    adapters = [path.read_bytes() for path in golden.glob("adapters/*/adapter_config.json")]
    weights = [path.read_bytes() for path in golden.glob("adapters/*-gpt2/adapter_model.safetensors")]

    def read_cells(data: bytes, place: Path) -> None:
        (place / "cells.jsonl").write_bytes(data + b"\n")
        Cells(place / "cells.jsonl").changed(arms)

    def read_selection(data: bytes, place: Path) -> None:
        (place / SELECTION_FILE).write_bytes(data)
        recorded_neurons(str(runs[0]), read_record(place / SELECTION_FILE), model)

    def read_mark(data: bytes, place: Path) -> None:
        if not (place / "adapter_model.safetensors").exists():
            shutil.copytree(checkpoint, place, dirs_exist_ok=True)
        (place / NETWORK_DIR / MARKER_FILE).write_bytes(data)
        damage(place)

    def read_adapter(data: bytes, place: Path) -> None:
        (place / "adapter_config.json").write_bytes(data)
        saved = SavedAdapter.read(place)
        if isinstance(saved.config, NeuronTunerConfig):
            delta_mask(saved.config, find_neuron_sites(model, kind=saved.config.site))

    def read_weights(data: bytes, place: Path) -> None:
        read_adapter(adapters[0], place)
        (place / "adapter_model.safetensors").write_bytes(data)
        dict(SavedAdapter.read(place).tensors)

    def read_occupied(data: bytes, place: Path) -> None:
        for name in ("config.json", "results.json"):
            (place / name).write_bytes(data)
        check_target(place, REPORT)

    marks = [(checkpoint / NETWORK_DIR / MARKER_FILE).read_bytes()]
    kinds = [b'{"format": "fnsft_trl.template", "format_version": 3}', b'{"format": "fnsft_trl.run"}']
    return {
        "cells": Target(cells, read_cells, share=0.06),
        "run records": Target(records, read_selection, share=0.02),
        "checkpoint marks": Target(marks, read_mark, share=0.01),
        "adapter descriptions": Target(adapters, read_adapter, share=0.02),
        "adapter tensors": Target(weights, read_weights, is_json=False, share=0.02),
        "what lies in a folder": Target(kinds, read_occupied, share=0.02),
    }


def _findings(folder: Path) -> dict[str, Target]:
    """What discoveries and probes have written."""
    import torch

    from fnsft_trl.discovery.directions import InputDirections, KeptDirections
    from fnsft_trl.discovery.saved_directions import ABOUT_FILE, TENSORS_FILE, load_directions, save_directions
    from fnsft_trl.probes.atlas import ProbeResults
    from fnsft_trl.probes.example_file import EXAMPLES_FILE, Example, Examples
    from fnsft_trl.probes.records import Records

    basis = torch.eye(6, dtype=torch.float64)[:, :2]
    kept = KeptDirections((InputDirections(("up", "gate"), basis, torch.ones(6, dtype=torch.float64)),))
    save_directions(kept, folder / "directions", {"texts": {"wiki": 100}})
    Examples(((Example(("a", "b"), (0.5, -2.0), "wiki"),), ()), 100, "0" * 64).save(folder)
    records = Records(folder / "probe", about := {"model": "m", "draws": 3})
    for batch in range(2):
        for key in ("intact", "lesion"):
            scores = {"nll": [1.0, 2.0], "kl": [0.0, 0.1], "exact": [1, 0]}
            records.add("rows", batch, key, scores, seconds=1.0, share=0.5)
    records.add_texts("rows", "intact", ["ba", "ko"])
    records.add_timing(2.0, 1.0)
    records.flush()
    interval = {"value": 0.1, "low": 0.0, "high": 0.2}
    verdict = {"network": "0", "effect": interval, "verdict": "it matters"}
    verdict["controls"] = {"random": {"mean": 0.1, "highest": 0.2, "draws": 3}}
    curves = {"union": [{"selector": "networks", "point": 1, "cross_entropy": 0.1}]}
    results = {"data": {"rows": {"verdicts": [verdict], "curves": curves}}}

    def read_directions(name: str):
        def read(data: bytes, place: Path) -> None:
            for file in (ABOUT_FILE, TENSORS_FILE):
                (place / file).write_bytes(data if file == name else (folder / "directions" / file).read_bytes())
            load_directions(place)

        return read

    def read_examples(data: bytes, place: Path) -> None:
        (place / EXAMPLES_FILE).write_bytes(data)
        Examples.read(place, tensors_sha256="0" * 64, networks=2)

    def read_passes(data: bytes, place: Path) -> None:
        (place / "passes-0.jsonl").write_bytes(data)
        known = Records(place, about)
        if not any(known.missing("rows", batch, ["intact"]) for batch in range(2)):
            known.scores("rows", 2, "intact")
        known.texts("rows", "intact")
        known.cost()

    def read_results(data: bytes, place: Path) -> None:
        (place / "results.json").write_bytes(data)
        found = ProbeResults.read(place)
        found.verdicts(0)
        found.rise(1)
        found.charts()

    passes = (folder / "probe" / "passes-0.jsonl").read_bytes()
    return {
        "directions": Target([(folder / "directions" / ABOUT_FILE).read_bytes()], read_directions(ABOUT_FILE)),
        "tensors of directions": Target(
            [(folder / "directions" / TENSORS_FILE).read_bytes()], read_directions(TENSORS_FILE), is_json=False
        ),
        "examples": Target([(folder / EXAMPLES_FILE).read_bytes()], read_examples),
        "probe passes": Target([passes], read_passes, is_json=False),
        "probe results": Target([json.dumps(results).encode()], read_results),
    }
