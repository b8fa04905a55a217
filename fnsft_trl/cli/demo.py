"""fnsft demo: an experiment that the package brings: one discovery, ways to fine-tune, and what each forgets."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..occupied import REPORT
from ..report.figures import check_pyplot
from ..writing import written_whole
from .endings import command
from .options.arguments import Arguments, read_arguments
from .options.schema import Option, row
from .output import check_writable
from .recipe_arms import find_recipes, read_arms


if TYPE_CHECKING:
    from ..experiments.arms import Arm
    from ..training.trainer import FNSFTTrainer


ABOUT = (
    "Show every step on a real model. The demo discovers functional networks and fine-tunes on a new task in "
    "several ways, one of them protected. It restores one of them afterwards, measures what was learnt and what was "
    "forgotten, and writes a report. Its recipes and data go to output_dir, where `fnsft train` and `fnsft "
    "experiment` can use them."
)
LOGITS_FILE = (
    "logits.safetensors"  # in the folder of a cell: what the trained model says, to be checked after reloading
)

_PROBES = (8, 8)  # rows whose logits are compared after reloading, and their tokens
_SOURCE, _RESTORED = "lora", "restored"  # the arm that is restored, and what that is called

# The rows are trained as they are: question and answer, without a chat template.
_RECIPE = """\
# fnsft train --config {path}
#
# {about}
model_name_or_path: {model}
dataset_name: {data}
template_format: basic
prompt_template: "{{instruction}}{{response}}"

{own}
retention_datasets: [wiki=embedded]
retention_tokens: {retention_tokens}

output_dir: {output}
learning_rate: {learning_rate}
lr_scheduler_type: cosine
warmup_steps: 3
weight_decay: 0.0
num_train_epochs: 1
per_device_train_batch_size: 8
per_device_eval_batch_size: 16
max_length: 64
gradient_checkpointing: false
logging_steps: 20
save_strategy: "no"
report_to: none
use_cpu: true
bf16: false
"""
_LORA = """\
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [gate_proj, up_proj, down_proj]
"""
_NETWORKS = """\
ica_datasets: [embedded]
ica_components: {components}
ica_max_tokens: {discovery_tokens}
ica_max_length: 256
ica_rank: {rank}
ica_fraction: 0.1
"""
# Name of the arm -> what it is, its learning rate (chosen so that all learn the task about equally well), its options.
_ARMS = {
    "lora": ("LoRA r 8 on the MLPs.", "6.0e-4", _LORA),
    "outside": (
        "Neuron deltas for the 10% of neurons in every layer that lie most outside the networks of general text.",
        "4.0e-4",
        _NETWORKS + "ica_rank_by: lowest\n",
    ),
    "protected": (
        "LoRA r 8 on the MLPs, kept off the directions in which general text runs through them.",
        "2.0e-3",
        _LORA + "forgetting: low\nprotect_tokens: {keep_tokens}\n",
    ),
}
_REMARK = (
    "This is one seed and one task. It shows how the parts work together, and proves nothing about the method. "
    "Learning rates were chosen beforehand on this task, so that the arms learn about equally well. Every adapter "
    "gave the same logits, bit for bit, after it was loaded in a fresh process. The arms: lora trains LoRA on the "
    "MLPs. outside trains, as neuron deltas, the 10% of each layer's neurons with the lowest loadings on all networks "
    "of general text. It has no control here; docs/example.md compares such neurons with random ones, which forgot "
    "less on another task. protected trains the same LoRA with forgetting: low, off the leading directions of other "
    "Wikipedia passages. restored is the trained lora without its change along position 0 and the mean of these "
    "passages; it needs no training. The new task: name the desk a question belongs to (arithmetic, finance, "
    "health, household, science, trivia). The questions are real ones of ASDiv, FiQA, HealthSearchQA, PIQA, "
    "OpenBookQA and NQ-open. The general text: English Wikipedia passages (BoolQ), from other articles than those of "
    "the discovery and the protection. General text of another kind is protected only in part."
)


def options() -> list[Option]:
    """The options of the verb."""
    return [
        row("model_name_or_path", "Hub id or directory, or `embedded`.", "embedded", metavar="MODEL"),
        row("output_dir", "Where the report and the adapters go.", "demo_output", metavar="DIR"),
        row("discovery_tokens", "Number of tokens to discover networks on.", 20_000, lowest=1),
        row("components", "Number of networks.", 10, lowest=1),
        row("train_rows", "Number of rows of the new task to train on.", 480, lowest=1),
        row("test_rows", "Number of rows of the new task to test on.", 120, lowest=1),
        row("retention_tokens", "Number of tokens of general text to score.", 4_000, lowest=1),
        row(
            "keep_tokens",
            "Number of tokens of general text from which directions to protect and to restore are found.",
            4096,
            lowest=16,
        ),
        row("seed", "Seed of the data order and the adapters.", 0),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    output = check_writable(args.output_dir, REPORT)
    check_pyplot()
    started = time.monotonic()

    from ..data.embedded import question_routing, resolve_model
    from ..experiments import compare_arms, run_experiment

    train, test = question_routing(args.train_rows, args.test_rows)
    model = resolve_model(args.model_name_or_path)
    rows = {"question_routing": train, "question_routing_test": test}
    data = [_written(output / "data" / f"{name}.jsonl", found) for name, found in rows.items()]
    files, _ = find_recipes(_write_recipes(args, data[0], output))
    arms = read_arms(files, {}, data=[data[1]])
    arms.append(_restored(next(arm for arm in arms if arm.name == _SOURCE), args.keep_tokens))
    cells = run_experiment(
        arms, [args.seed], output, restart=True, also=partial(_checked, model), say=lambda text: print(f"== {text}")
    )
    _show_networks(output, cells)
    _check_reload(model, output, cells)
    print(compare_arms(arms, cells, output, title=f"fnsft demo: {args.model_name_or_path}", remark=_REMARK))
    seconds = round(time.monotonic() - started)
    print(f"Report: {output / 'report.html'} (also report.md, results.json), {seconds} s")


def interrupted(argv: list[str]) -> str:
    """How to go on with one that was interrupted."""
    return f"interrupted; what was finished is kept, go on with {command('demo', argv)}"


def _written(path: Path, rows: list[dict[str, str]]) -> str:
    """Write rows to a file, and give its path."""
    with written_whole(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _write_recipes(args: Arguments, data: str, output: Path) -> list[str]:
    """Write the recipe of every arm, and give their files."""
    written = []
    sizes = {"components": args.components, "rank": max(128, args.components)}
    sizes |= {"discovery_tokens": args.discovery_tokens, "keep_tokens": args.keep_tokens}
    for name, (about, learning_rate, own) in _ARMS.items():
        path = output / "recipes" / f"{name}.yaml"
        text = _RECIPE.format(
            path=path,
            about=about,
            model=json.dumps(args.model_name_or_path),
            data=json.dumps(data),
            own=own.format(**sizes),
            retention_tokens=args.retention_tokens,
            output=json.dumps(str(output / "alone" / name)),
            learning_rate=learning_rate,
        )
        with written_whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
        written.append(str(path))
    return written


def _restored(source: "Arm", keep_tokens: int) -> "Arm":
    """The arm that trains nothing: what another one has trained, restored."""
    about = {"restored": f"{source.name}, off position 0, mean", "keep": f"embedded, {keep_tokens} tokens"}
    change = partial(_restore, keep_tokens)
    return replace(source, name=_RESTORED, settings=source.settings | about, change=change)


def _restore(keep_tokens: int, trainer: "FNSFTTrainer", directory: Path) -> None:
    """Give a LoRA what the arm of the same seed has trained, off the first two directions of general text, as
    `fnsft restore` does it."""
    from ..discovery.directions import LEADING, KeptDirections
    from ..export.restored import AdapterChanges, Places
    from ..interventions.restoring import Restoration
    from ..training.protected_bases import KeptTexts
    from ..training.protection_config import ProtectionConfig
    from ..tuner.saved import SavedAdapter

    config = ProtectionConfig(forgetting="low", protect_tokens=keep_tokens)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    texts = {name: text for name, (text, _) in KeptTexts(config).tokenized(tokenizer).items()}
    changes = AdapterChanges.read(SavedAdapter.read(directory.parent.parent / _SOURCE / directory.name))
    model = trainer.model.eval()
    with model.disable_adapter():
        kept = KeptDirections.find(model, changes.modules, texts, leading=0)
    changes.apply(model, Restoration(LEADING), Places({"": kept}))


def _checked(model_path: str, trainer, directory: Path) -> dict[str, Any]:
    """Which neurons have changed, compared with the weights of the base, and whether they are those that were to."""
    from safetensors.torch import save_file
    from torch import tensor

    from ..evaluation.reload import last_logits
    from ..export import changed_neurons
    from ..neurons import find_neuron_sites
    from .models import load_model
    from .options.loading import LoadingConfig

    rows, tokens = _PROBES
    probe = tensor([row["input_ids"][:tokens] for row in trainer.eval_dataset.select(range(rows))])
    logits = last_logits(trainer.model, probe)
    save_file({"input_ids": probe, "logits": logits}, directory / LOGITS_FILE)
    base = load_model(model_path, LoadingConfig())
    sites = find_neuron_sites(base)
    changed, others = changed_neurons(sites, base.state_dict(), trainer.model.merge_and_unload().state_dict())
    frozen = None if trainer.network_config is None else changed == trainer.trainable_neurons and not others
    if frozen is False:
        raise RuntimeError(f"{directory}: the neurons that changed are not those that were selected")
    return {
        "neurons_changed": f"{changed.count:,} of {sum(site.width for site in sites):,}",
        "frozen_bit_identical": frozen,
    }


def _show_networks(output: Path, cells: list[dict[str, Any]]) -> None:
    """Say which networks the arms share."""
    from ..experiments.runner import TEMPLATES
    from ..template.template import FunctionalNetworkTemplate

    for folder in dict.fromkeys(cell["template"] for cell in cells if cell["template"]):
        template = FunctionalNetworkTemplate.from_pretrained(output / TEMPLATES / folder)
        for number, component in enumerate(template.components):
            layers = sorted(component.layers, key=component.layers.get, reverse=True)[:3]
            print(
                f"   network {number}: {component.neurons} neurons, most in layers {', '.join(map(str, layers))}; "
                f"reliability {component.reliability:.2f}, above null {template.reliability_above_null(number):.2f}"
            )


def _check_reload(model_path: str, output: Path, cells: list[dict[str, Any]]) -> None:
    """See that every adapter gives the logits that it was saved with, in a fresh process."""
    from safetensors.torch import load_file

    from ..evaluation.reload import check_reload
    from ..experiments.runner import ARMS

    print("== reloading every adapter in a fresh process", flush=True)
    adapters = {cell["arm"]: output / ARMS / cell["arm"] / f"seed-{cell['seed']}" for cell in cells}
    saved = {name: load_file(path / LOGITS_FILE) for name, path in adapters.items()}
    probe = next(iter(saved.values()))["input_ids"]
    differences = check_reload(model_path, adapters, probe, {name: file["logits"] for name, file in saved.items()})
    for name, difference in differences.items():
        print(f"   {name}: largest difference of the logits {difference:g}")
    if any(differences.values()):
        raise RuntimeError(f"a reloaded adapter does not give the logits it was saved with: {differences}")
