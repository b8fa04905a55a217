"""Three tasks of lm-evaluation-harness in a folder: multiple-choice questions, text, and answers to generate."""

import json
import random
from pathlib import Path

import yaml
from helpers import tiny_rows


def questions(count: int = 200) -> list[dict]:
    """Questions of a few syllables, each with three to five answers of different lengths."""
    draw = random.Random(0)
    found = []
    for row in tiny_rows(count, seed=7):
        choices = [other["completion"].strip() for other in tiny_rows(draw.randint(3, 5), seed=draw.randint(0, 10**6))]
        choices = [choice + " é" * draw.randint(0, 6) for choice in choices]  # bytes that are no characters
        found.append({"question": row["prompt"], "choices": choices, "answer": draw.randrange(len(choices))})
    return found


def write_tasks(folder: Path) -> None:
    """Write the tasks `syllables`, `sounds` and `said`, and their rows."""
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions())))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": row["prompt"]}) for row in tiny_rows(20)))
    data = {"dataset_path": "json", "test_split": "test"}
    mean = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")
    ]
    choosing = {
        **{"task": "syllables", **data, "output_type": "multiple_choice", "metric_list": mean},
        **{"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "answer"},
        **{"doc_to_choice": "{{choices}}", "metadata": {"version": 1.0}},
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
    }
    reading = {
        **{"task": "sounds", **data, "output_type": "loglikelihood_rolling"},
        **{"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
    }
    saying = {
        **{"task": "said", **data, "output_type": "generate_until", "dataset_kwargs": reading["dataset_kwargs"]},
        **{"doc_to_text": "{{text}}", "doc_to_target": " ab.", "metric_list": [{"metric": "exact_match"}]},
        "generation_kwargs": {"until": ["."], "max_gen_toks": 2},
    }
    for task in (choosing, reading, saying):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
