"""A small experiment on a tiny model: three recipes, with networks and without, and the data that they name."""

import json
import os
import signal
import sys
from pathlib import Path

import yaml
from helpers import tiny_rows

from fnsft_trl.cli import main


REPORT = ("report.md", "report.html", "results.json", "cells.jsonl")
_WRITES = ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree")

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-2,
    "max_length": 32,
    "retention_tokens": 60,
}
NETWORKS = {"ica_components": 3, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 32, "ica_fraction": 0.25}
ARMS = {
    "deltas": {**NETWORKS, "ica_rank_by": "lowest", "eval_strategy": "steps", "eval_steps": 2},
    "lora": {"use_peft": True, "lora_r": 2, "lora_target_modules": ["up_proj", "gate_proj", "down_proj"]},
    "random": {**NETWORKS, "ica_select": "random"},
}


def make_folder(directory: Path, model_dir: Path) -> Path:
    """Write recipes and data into a directory, and give the folder of the recipes."""
    rows = {"train": tiny_rows(16), "test": tiny_rows(8, seed=1)}
    rows["general"] = [{"text": row["prompt"] * 3} for row in tiny_rows(12, seed=2)]
    for name, found in rows.items():
        (directory / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in found))
    folder = directory / "recipes"
    folder.mkdir()
    data = {"model_name_or_path": str(model_dir), "dataset_name": str(directory / "train.jsonl")}
    data["retention_datasets"] = [f"general={directory / 'general.jsonl'}"]
    for name, own in ARMS.items():
        text = {"ica_datasets": [str(directory / "general.jsonl")]} if "ica_fraction" in own else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | COMMON | text | own))
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"data": [str(directory / "test.jsonl")], "seeds": [0, 1]}))
    return folder


def edit(file: Path, **changes) -> None:
    """Change keys of a YAML file; `None` takes one away."""
    values = yaml.safe_load(file.read_text()) | changes
    file.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))


def run(folder: Path, output: Path, *more: str) -> int:
    """Run the experiment, and give its status."""
    return main(["experiment", str(folder), "--output_dir", str(output), *more])


def report(output: Path) -> dict[str, bytes]:
    """The files that an experiment leaves, but for models and templates."""
    return {name: (output / name).read_bytes() for name in REPORT}


def killed_after(events: int, folder: Path, output: Path, *more: str, start=run) -> bool:
    """Run the experiment in a process that is killed (SIGKILL) after so many writes; whether it was.

    Args:
        events: so many.
        folder, output, more: as [`run`] takes them.
        start: what is run.
    """
    child = os.fork()
    if child == 0:
        left = events

        def count(event, arguments):
            nonlocal left
            opens = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
            if (opens or event in _WRITES) and str(arguments[0]).startswith(str(output)):
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        signal.alarm(300)
        os._exit(start(folder, output, *more))
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
