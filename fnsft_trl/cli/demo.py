"""fnsft demo: discover, fine-tune three ways, measure what was learnt and forgotten, reload, report."""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..config import FunctionalNetworkConfig
from ..errors import FNSFTError
from ..report.figures import check_pyplot, trade_off_figure
from ..report.report import Report, format_table
from ..template.storage import FIGURE_FILE
from .arguments import ArgumentParser, check_writable


FRACTION = 0.1
TEMPLATE = "template"  # directory of the networks


@dataclass
class Arm:
    """One way of fine-tuning.

    Attributes:
        name (`str`): as it stands in the table.
        key (`str`): name of its directory.
        learning_rate (`float`): chosen so that all arms learn the task about equally well.
        networks (`dict` or `None`): fields of its FunctionalNetworkConfig; `None` for plain LoRA.
    """

    name: str
    key: str
    learning_rate: float
    networks: dict | None = field(default=None)


ARMS = [
    Arm("LoRA on the MLPs", "lora", 6e-4),
    Arm("neurons outside the networks", "outside", 4e-4, {"ica_rank_by": "lowest"}),
    Arm("random neurons", "random", 4e-4, {"ica_select": "random"}),
]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft demo",
        description="The whole way on a real model: discover its functional networks, fine-tune it on a new task in "
        "three ways, measure what it learnt and what it forgot, and write a report.",
    )
    parser.add_argument("--model_name_or_path", default="embedded", help="Hub id or directory, or `embedded`")
    parser.add_argument("--output_dir", default="demo_output", help="where the report and the adapters go")
    parser.add_argument("--discovery_tokens", type=int, default=20_000, help="tokens to discover networks on")
    parser.add_argument("--components", type=int, default=10, help="number of networks")
    parser.add_argument("--train_rows", type=int, default=480, help="rows of the new task to train on")
    parser.add_argument("--test_rows", type=int, default=120, help="rows of the new task to test on")
    parser.add_argument("--retention_tokens", type=int, default=4_000, help="tokens of general text to score")
    parser.add_argument("--seed", type=int, default=0, help="of the data order, the adapters and the random neurons")
    args = parser.parse_args(argv)
    for name in ("discovery_tokens", "components", "train_rows", "test_rows", "retention_tokens"):
        if getattr(args, name) < 1:
            raise FNSFTError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    output = check_writable(args.output_dir)
    check_pyplot()
    discovery = FunctionalNetworkConfig(
        ica_components=args.components,
        ica_max_tokens=args.discovery_tokens,
        ica_max_length=256,
        ica_rank=max(128, args.components),
    )
    _run(args, discovery, output)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(args, discovery: FunctionalNetworkConfig, output: Path) -> None:
    started = time.monotonic()
    import torch
    from transformers.utils import logging

    from ..data.embedded import question_routing, resolve_model, wikipedia_passages
    from ..discovery.discovery import discover_networks
    from ..evaluation.metrics import score_completions
    from ..evaluation.reload import check_reload, last_logits
    from ..evaluation.retention import RetentionText
    from ..export import changed_neurons
    from ..neurons.sites import find_neuron_sites
    from .models import load_model_and_tokenizer

    model_path = resolve_model(args.model_name_or_path)
    logging.set_verbosity_error()  # from here on the demo says itself what it does
    model, tokenizer = load_model_and_tokenizer(model_path)
    train, test = question_routing(args.train_rows, args.test_rows)
    retention = RetentionText.from_texts(wikipedia_passages("retention"), tokenizer, max_tokens=args.retention_tokens)

    _say(f"1/4 Discovering {args.components} functional networks on {args.discovery_tokens} tokens of Wikipedia text")
    source = "English Wikipedia passages (BoolQ), discovery half"
    template = discover_networks(model, tokenizer, {source: wikipedia_passages("discovery")}, discovery)
    template.save_pretrained(output / TEMPLATE)
    for number, component in enumerate(template.components):
        layers = sorted(component.layers, key=component.layers.get, reverse=True)[:3]
        print(
            f"   network {number}: {component.neurons} neurons, most in layers {', '.join(map(str, layers))}; "
            f"reliability {component.reliability:.2f}"
        )

    _say("2/4 Measuring the model before training: the new task, and general text (disjoint from the discovery's)")
    base_task = score_completions(model, tokenizer, test)
    base_nll = retention.sequence_nll(model)
    base_retention = float(base_nll.sum()) / retention.tokens
    print(
        f"   exact match {base_task.exact_match:.2f}, NLL {base_task.nll:.2f} on {base_task.rows} rows; cross-entropy "
        f"{base_retention:.3f} on {retention.tokens} tokens"
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = find_neuron_sites(model)
    mlp_modules = [name for site in sites for name in site.layout.modules()]
    del model

    probe = torch.tensor([tokenizer(row["prompt"])["input_ids"][:8] for row in test[:8]])
    results, adapters, expected, nll = [], {}, {}, {}
    for arm in ARMS:
        _say(f"3/4 Fine-tuning: {arm.name} ({len(train)} rows, learning rate {arm.learning_rate:g})")
        trainer = _train(arm, args, model_path, tokenizer, train, template, mlp_modules, output)
        task = score_completions(trainer.model, tokenizer, test)
        nll[arm.key] = retention.sequence_nll(trainer.model)
        rise, *interval = retention.rise(base_nll, nll[arm.key])
        adapters[arm.key] = output / "arms" / arm.key
        expected[arm.key] = last_logits(trainer.model, probe)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        changed, others = changed_neurons(sites, before, trainer.model.merge_and_unload().state_dict())
        frozen_ok = None if arm.networks is None else changed == trainer.trainable_neurons and not others
        results.append(
            {
                "arm": arm.name,
                "key": arm.key,
                "learning_rate": arm.learning_rate,
                "trained_parameters": trained,
                "changed_neurons": changed.count,
                "neurons": sum(site.width for site in sites),
                "frozen_bit_identical": frozen_ok,
                "exact_match": task.exact_match,
                "nll": task.nll,
                "retention_rise": rise,
                "retention_interval": interval,
            }
        )
        print(f"   exact match {task.exact_match:.2f}, NLL {task.nll:.2f}; general text {rise:+.4f} nats per token")
        if frozen_ok is False:
            raise RuntimeError(f"{arm.name}: the neurons that changed are not those that were selected")
        del trainer

    _say("4/4 Reloading every adapter in a fresh process")
    differences = check_reload(model_path, adapters, probe, expected)
    for result in results:
        result["reload_difference"] = differences[result["key"]]
        print(f"   {result['arm']}: largest difference of the logits {result['reload_difference']:g}")
    if any(differences.values()):
        raise RuntimeError(f"a reloaded adapter does not give the logits it was saved with: {differences}")

    summary = {
        "model": template.base_model,
        "seeds": [args.seed],
        "train_rows": len(train),
        "test_rows": len(test),
        "base": {"exact_match": base_task.exact_match, "nll": base_task.nll, "cross_entropy": base_retention},
        "retention_tokens": retention.tokens,
        "discovery_sha256": template.calibration["sha256"],
        "retention_sha256": retention.sha256,
        "discovery": asdict(discovery),
        "arms": results,
        "random_minus_outside": retention.rise(nll["outside"], nll["random"]),
        "seconds": round(time.monotonic() - started),
    }
    _write_report(summary, template, output)


def _train(arm: Arm, args, model_path: str, tokenizer, rows: list[dict], template, mlp_modules, output: Path):
    """Fine-tune one arm; all arms see the same rows in the same order."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from ..training.trainer import FNSFTTrainer

    directory = output / "arms" / arm.key
    networks = peft_config = None
    if arm.networks is None:
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=mlp_modules, task_type="CAUSAL_LM")
    else:
        networks = FunctionalNetworkConfig(ica_fraction=FRACTION, ica_seed=args.seed, **arm.networks)
    trainer = FNSFTTrainer(
        model=model_path,
        args=SFTConfig(
            output_dir=str(directory),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=arm.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            weight_decay=0.0,
            max_length=64,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        network_config=networks,
        network_template=template if networks else None,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def _verdict(results: list[dict]) -> str:
    least = min(results, key=lambda result: result["retention_rise"])
    best = min(results, key=lambda result: result["nll"])
    return (
        f"Forgot least: {least['arm']} ({least['retention_rise']:+.4f} nats per token of general text). Learnt best: "
        f"{best['arm']} (NLL {best['nll']:.2f})."
    )


CAUTION = (
    "This is one seed, one task and one control: it shows how the parts work together and proves nothing about the "
    "method. Learning rates were chosen beforehand on this task so that the arms learn about equally well; arms "
    "that do not cannot be compared by forgetting alone."
)


def _write_report(summary: dict, template, output: Path) -> None:
    base, arms = summary["base"], summary["arms"]
    header = [
        "arm",
        "trained parameters",
        "neurons changed",
        "frozen bit-identical",
        "exact match",
        "NLL",
        "forgetting",
    ]
    rows = [["before training", "", "", "", f"{base['exact_match']:.2f}", f"{base['nll']:.2f}", ""]]
    marks = {None: "does not apply", True: "yes", False: "NO"}
    for arm in arms:
        rows.append(
            [
                arm["arm"],
                f"{arm['trained_parameters']:,}",
                f"{arm['changed_neurons']:,} of {arm['neurons']:,}",
                marks[arm["frozen_bit_identical"]],
                f"{arm['exact_match']:.2f}",
                f"{arm['nll']:.2f}",
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(arm["retention_rise"], *arm["retention_interval"]),
            ]
        )
    note = (
        f"n = {summary['test_rows']} test rows and {summary['retention_tokens']} tokens of general text, "
        f"{len(summary['seeds'])} seed, {summary['train_rows']} training rows. Forgetting: rise of cross-entropy on "
        "general text, in nats per token, with its 95% interval over texts (not over seeds). NLL: nats per answer."
    )
    difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*summary["random_minus_outside"])
    verdict = f"{_verdict(arms)} Random neurons forgot {difference} more than neurons outside the networks."

    report = Report(f"fnsft demo: {summary['model']}")
    report.text(f"{verdict} {CAUTION}")
    report.heading("What was learnt and what was forgotten")
    report.table(header, rows)
    report.text(note)
    points = [(arm["arm"], arm["nll"], arm["retention_rise"]) for arm in arms]
    report.figure(
        "learning_and_forgetting",
        trade_off_figure(
            points,
            learning="NLL of the new task, nats per answer (left: learnt better)",
            forgetting="rise of cross-entropy on general text\nnats per token (down: forgot less)",
        ),
        f"Learning against forgetting, one seed; before training the task's NLL was {base['nll']:.2f}.",
    )
    report.text(
        f"Both kinds of neuron deltas train {FRACTION:.0%} of the neurons of every layer: those with the lowest "
        "loadings on all networks (outside the functional networks of general text), or as many at random. Every "
        "adapter gave the same logits, bit for bit, after it was loaded in a fresh process."
    )
    report.heading("The networks")
    report.figure(
        "networks",
        (output / TEMPLATE / FIGURE_FILE).read_bytes(),
        f"{len(template.components)} networks of {template.base_model} from {template.calibration['tokens']} tokens. "
        "Reliability: correlation of a network's loadings between two disjoint halves of the tokens.",
    )
    report.heading("Data")
    report.text(
        f"Discovery text: {', '.join(template.calibration['sources'])}; SHA-256 of its token ids "
        f"{summary['discovery_sha256']}."
    )
    report.text(
        "Retention text: English Wikipedia passages (BoolQ), other articles than those of the discovery; SHA-256 of "
        f"its token ids {summary['retention_sha256']}."
    )
    report.text(
        "New task: name the desk a question belongs to (arithmetic, finance, health, household, science, trivia); "
        "real questions of ASDiv, FiQA, HealthSearchQA, PIQA, OpenBookQA and NQ-open."
    )
    report.save(output, summary)

    print(f"\n{format_table(header, rows)}\n\n{note}\n\n{verdict}\n{CAUTION}\n")
    print(f"Report: {output / 'report.html'} (also report.md, results.json), {summary['seconds']} s", file=sys.stdout)
