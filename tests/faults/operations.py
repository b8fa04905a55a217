"""What takes a while and writes something, as commands on a tiny model: what `kills.py` interrupts."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


FOLDER_OF_CACHE = "cache"

# A GGUF converter that takes a while over its two halves.
CONVERTER = f"""\
#!{sys.executable}
import hashlib, pathlib, sys, time
weights = (pathlib.Path(sys.argv[1]) / "model.safetensors").read_bytes()
with open(sys.argv[sys.argv.index("--outfile") + 1], "wb") as file:
    file.write(b"GGUF")
    file.flush()
    time.sleep(0.3)
    file.write(hashlib.sha256(weights).digest())
"""


@dataclass(frozen=True)
class Operation:
    """
    Something that takes a while and is written in the end.

    Attributes:
        call (`Callable`): given a folder with the inputs and one for the outcome, a command of `fnsft`.
        again (`Callable`): given the folder of the outcome, what is added to the command to go on from there; `None`
            where all is there, and the command would be refused for it.
        counts (`tuple[str, ...]`): patterns of the files that must be equal.
        begins_as (`str`, *optional*): a folder of the inputs, of which the outcome begins as a copy.
        has_own_cache (`bool`): whether the user's cache belongs to the outcome.
    """

    call: Callable[[Path, Path], list[str]]
    counts: tuple[str, ...]
    again: Callable[[Path], list[str] | None] = field(default=lambda out: [])
    begins_as: str | None = None
    has_own_cache: bool = False

    def begin(self, inputs: Path, out: Path) -> None:
        """Put the outcome as it is before."""
        shutil.rmtree(out, ignore_errors=True)
        if self.begins_as is not None:
            shutil.copytree(inputs / self.begins_as, out)

    def variables(self, inputs: Path, out: Path) -> Mapping[str, str]:
        """Of the environment."""
        return {"FNSFT_CACHE": str((out if self.has_own_cache else inputs) / FOLDER_OF_CACHE)}


def _trained(inputs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_name_or_path", f"{inputs}/model", "--ica_template_path", f"{inputs}/template"),
        *("--output_dir", str(out), "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_length", "32"),
        *("--disable_tqdm", "true", "--learning_rate", "0.01", *more),
    ]


def _training(*way: str) -> Operation:
    def call(inputs: Path, out: Path) -> list[str]:
        saved = ("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2", "--max_steps", "24")
        return _trained(inputs, out, "--dataset_name", f"{inputs}/rows.jsonl", *saved, *way)

    def again(out: Path) -> list[str]:
        marks = out.glob("checkpoint-*/functional_networks/complete.json")  # else "no checkpoint was complete yet"
        return ["--resume_from_checkpoint", "true"] if any(marks) else []

    weights = "model*.safetensors" if "full" in way else "adapter_model.safetensors"
    return Operation(call, (weights, "functional_networks/template.safetensors"), again)


def _caching(inputs: Path, out: Path) -> list[str]:
    """Many rows, of which few are trained: most of the time goes to their tokens, which are kept."""
    few = ("--dataset_name", f"{inputs}/many.jsonl", "--max_steps", "1", "--save_strategy", "no")
    return _trained(inputs, out, *few, "--train_method", "neuron_delta")


def _discovery(inputs: Path, out: Path) -> list[str]:
    return [
        *("discover", f"{inputs}/model", f"{inputs}/rows.jsonl", "--output_dir", str(out)),
        *("--ica_components", "3", "--ica_rank", "16", "--ica_max_tokens", "3000", "--ica_max_length", "32"),
        *("--ica_batch_size", "1"),
    ]


def _discovery_again(out: Path) -> list[str]:
    return ["--resume"] if any((out / ".progress").glob("batch-*/process-0.safetensors")) else []


def _convert(inputs: Path, out: Path) -> list[str]:
    return ["inspect", f"{inputs}/original.json", "--convert", str(out)]


def _name(inputs: Path, out: Path) -> list[str]:
    return ["inspect", str(out), "--name", "0=dates", "2=years"]


def _experiment(inputs: Path, out: Path) -> list[str]:
    return ["experiment", f"{inputs}/recipes", "--output_dir", str(out)]


def _continual(inputs: Path, out: Path) -> list[str]:
    return ["continual", f"{inputs}/continual/plan.yaml", "--output_dir", str(out)]


def _probe(inputs: Path, out: Path) -> list[str]:
    return [
        *("probe", f"{inputs}/model", f"{inputs}/template", "--data", f"rows={inputs}/test.jsonl"),
        *("--output_dir", str(out), "--max_tokens", "60", "--draws", "3", "--batch_size", "4", "--networks", "0-1"),
    ]


def _evaluate(inputs: Path, out: Path) -> list[str]:
    data = ("--data", f"rows={inputs}/test.jsonl", "--generate", "--max_new_tokens", "8")
    return ["evaluate", f"{inputs}/adapter", "--base", *data, "--output_dir", str(out)]


def _restore(inputs: Path, out: Path) -> list[str]:
    return [
        *("restore", f"{inputs}/adapter", "--keep", f"general={inputs}/general.jsonl", "--output_dir", str(out)),
        *("--keep_tokens", "100", "--score_tokens", "80", "--leading", "2", "--choose", "off position 0, mean"),
    ]


def _restore_again(out: Path) -> list[str] | None:
    return None if out.exists() else []


def _export(form: str) -> Operation:
    mask = ("--mask_mode", "lesion", "--ica_component_ids", "0") if form in ("baked", "smaller") else ()

    def call(inputs: Path, out: Path) -> list[str]:
        chosen = (*mask, "--ica_template_path", f"{inputs}/template") if mask else ()
        return ["export", f"{inputs}/adapter", "--to", form, "--output_dir", str(out), *chosen]

    return Operation(call, ("*.safetensors", "*config.json"))


def _gguf(inputs: Path, out: Path) -> list[str]:
    words = ["export", f"{inputs}/adapter", "--to", "gguf", "--output_path", f"{out}/model.gguf"]
    return [*words, "--converter", f"{inputs}/converter"]


_TABLES = ("cells.jsonl", "report.md", "report.html", "results.json")

OPERATIONS = {
    "discovery": Operation(_discovery, ("config.json", "template.safetensors"), _discovery_again),
    "training, neuron deltas": _training("--train_method", "neuron_delta"),
    "training, LoRA": _training("--use_peft", "--lora_r", "4"),
    "training, full": _training("--train_method", "full"),
    "cache of tokens": Operation(_caching, ("cache/tokenized/*/*", "adapter_model.safetensors"), has_own_cache=True),
    "template, converted": Operation(_convert, ("config.json", "template.safetensors")),
    "template, named in place": Operation(_name, ("config.json", "template.safetensors"), begins_as="template"),
    "merged export": _export("merged"),
    "baked export": _export("baked"),
    "smaller export": _export("smaller"),
    "plain LoRA export": _export("lora"),
    "GGUF export": Operation(_gguf, ("model.gguf",)),
    "restored adapter": Operation(_restore, ("*.safetensors", "*config.json", "report.md"), _restore_again),
    "probe": Operation(_probe, ("conditions.jsonl", "examples.json", "*.svg")),
    "evaluation": Operation(_evaluate, ("report.md", "results.json", "*.jsonl")),
    "experiment": Operation(_experiment, _TABLES),
    "continual run": Operation(_continual, (*_TABLES, "base.jsonl")),
}


def prepare(folder: Path) -> Path:
    """Write what all operations read: a tiny model, rows, templates, an adapter, recipes, a plan, a converter."""
    from helpers import ROOT, tiny_model, tiny_rows, tiny_tokenizer
    from small_experiment import make_folder

    from fnsft_trl import FunctionalNetworkConfig, discover_networks
    from fnsft_trl.cli import main

    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), tiny_rows(200)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    for name, found in (("rows", rows), ("many", tiny_rows(4000, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_tokens=250, ica_max_length=32)
    discover_networks(model, tokenizer, [row["prompt"] for row in rows], config).save_pretrained(folder / "template")
    shutil.copy(ROOT / "tests" / "golden" / "templates" / "original.json", folder)
    make_folder(folder, folder / "model")
    _small_plan(folder)
    (folder / "converter").write_text(CONVERTER)
    (folder / "converter").chmod(0o755)
    words = OPERATIONS["training, neuron deltas"].call(folder, folder / "adapter")
    if main([*words, "--tokenized_cache", "false"]):
        raise RuntimeError("the adapter that exports read was not trained")
    return folder


def _small_plan(folder: Path) -> None:
    from continual.small_study import LORA, make_plan

    make_plan(folder / "continual", folder / "model", {"lora": LORA}, orders=[["dbpedia", "agnews"]], max_steps=1)
