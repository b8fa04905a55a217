"""A small continual run on a tiny model: tasks of its own rows, and every way to train them."""

import json
from pathlib import Path

import yaml
from helpers import tiny_rows

from fnsft_trl.cli import main


FILES = ("report.md", "report.html", "results.json", "cells.jsonl", "base.jsonl")

# Columns and labels of the standard four tasks, each with rows made here.
TASKS = {
    "dbpedia": {"columns": ("title", "content"), "labels": ["Company", "Artist"]},
    "amazon": {"columns": ("title", "content"), "labels": ["bad", "good"]},
    "yahoo": {"columns": ("question_title", "best_answer"), "labels": ["Health", "Sports"]},
    "agnews": {"columns": ("text", "text"), "labels": ["World", "Business"]},
}
NETWORKS = {"ica_components": 3, "ica_rank": 8, "ica_max_tokens": 400, "ica_max_length": 32, "ica_fraction": 0.25}
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["up_proj", "down_proj"]}
SHARED = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-2,
    "max_length": 48,
    "retention_tokens": 60,
}


def make_plan(directory: Path, model_dir: Path, arms: dict, **changes) -> Path:
    """Write data, tasks and a plan into a directory, and give the file of the plan."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for number, (name, task) in enumerate(TASKS.items()):
        for split, count in (("train", 12), ("test", 6)):
            rows = [
                dict.fromkeys(task["columns"], f"{name[:2]} {row['prompt']}") | {"label": place % 2}
                for place, row in enumerate(tiny_rows(count, seed=2 * number + (split == "test")))
            ]
            (directory / f"{name}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks[name] = {
            "dataset": "json",
            "data_files": str(directory / f"{name}-train.jsonl"),
            "test_data_files": str(directory / f"{name}-test.jsonl"),
            "test_split": "train",
            "prompt": "Topic? " + " ".join(f"{{{column}}}" for column in dict.fromkeys(task["columns"])),
            "answer": "{label}",
            "labels": dict(enumerate(task["labels"])),
            "scorer": "choice" if name == "yahoo" else "exact_match",
        }
    general = [{"text": row["prompt"] * 3} for row in tiny_rows(24, seed=9)]
    for name, part in (("general", general[:12]), ("kept", general[12:])):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (directory / "tasks.yaml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    plan = {
        "model_name_or_path": str(model_dir),
        "tasks": ["tasks.yaml"],
        "orders": {"order1": list(TASKS)},
        "retention_datasets": [f"general={directory / 'general.jsonl'}"],
        "arms": arms,
        **SHARED,
        **changes,
    }
    (directory / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return directory / "plan.yaml"


def every_arm(directory: Path) -> dict:
    """An arm of each method."""
    kept = [f"kept={directory / 'kept.jsonl'}"]
    return {
        "lora": LORA,
        "full": {"learning_rate": 1e-3},
        "replay": {**LORA, "replay": 0.25},
        "ewc": {**LORA, "ewc": 100.0, "ewc_rows": 4},
        "lwf": {"learning_rate": 1e-3, "lwf": 1.0},
        "new": {**LORA, "adapter": "new"},
        "olora": {**LORA, "olora": 20.0},
        "multitask": {**LORA, "multitask": True},
        "grows": {"learning_rate": 1e-3, "protect": "subspace", "protect_datasets": kept, "protect_dims": 2}
        | {"protect_grows": True, "protect_tokens": 64},
        "grows_lora": {**LORA, "protect": "subspace", "protect_datasets": kept, "protect_dims": 1}
        | {"protect_grows": True, "protect_tokens": 64},
    }


def arms_with_networks(directory: Path) -> dict:
    """An arm for each place in which networks are found."""
    kept = [str(directory / "kept.jsonl")]
    return {
        "once": {**NETWORKS, "ica_datasets": kept},
        "per_task": {**NETWORKS, "networks": "per_task"},
        "so_far": {**NETWORKS, "networks": "so_far", "ica_datasets": kept},
    }


def run(plan: Path, output: Path, *more: str) -> int:
    """Run a plan, and give its status."""
    return main(["continual", str(plan), "--output_dir", str(output), *more])


def report(output: Path) -> dict[str, bytes]:
    """The files that a run leaves, but for models and rows."""
    return {name: (output / name).read_bytes() for name in FILES}
