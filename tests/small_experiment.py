"""A small experiment on a tiny model: three recipes, with networks and without, and the data that they name."""

import json
from pathlib import Path

import yaml
from helpers import tiny_rows


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
