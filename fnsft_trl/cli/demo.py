"""fnsft demo: discover, fine-tune three ways, measure what was learnt and forgotten, reload, report."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import FunctionalNetworkConfig
from ..report.figures import check_pyplot
from .demo_report import TEMPLATE, write_report
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig
from .options.schema import Option, row
from .output import check_writable


ABOUT = (
    "The whole way on a real model: discover its functional networks, fine-tune it on a new task in three ways, "
    "measure what it learnt and what it forgot, and write a report."
)
FRACTION = 0.1


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


def options() -> list[Option]:
    """The options of the verb."""
    return [
        row("model_name_or_path", "Hub id or directory, or `embedded`.", "embedded", metavar="MODEL"),
        row("output_dir", "Where the report and the adapters go.", "demo_output", metavar="DIR"),
        row("discovery_tokens", "Tokens to discover networks on.", 20_000, lowest=1),
        row("components", "Number of networks.", 10, lowest=1),
        row("train_rows", "Rows of the new task to train on.", 480, lowest=1),
        row("test_rows", "Rows of the new task to test on.", 120, lowest=1),
        row("retention_tokens", "Tokens of general text to score.", 4_000, lowest=1),
        row("seed", "Of the data order, the adapters and the random neurons.", 0),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
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


@dataclass
class _Start:
    """The model before training, and what all arms are trained and scored on."""

    model_path: str
    tokenizer: Any
    template: Any
    train: list[dict]
    test: list[dict]
    retention: Any
    task: Any  # scores of the new task
    nll: Any  # of the sequences of the retention text
    weights: dict[str, Any]
    sites: list
    probe: Any  # token ids whose logits are compared after reloading


def _run(args: Arguments, discovery: FunctionalNetworkConfig, output: Path) -> None:
    started = time.monotonic()
    start = _start(args, discovery, output)
    results, nll = _train_all(args, start, output)
    base = {
        "exact_match": start.task.exact_match,
        "nll": start.task.nll,
        "cross_entropy": float(start.nll.sum()) / start.retention.tokens,
    }
    summary = {
        "model": start.template.base_model,
        "seeds": [args.seed],
        "train_rows": len(start.train),
        "test_rows": len(start.test),
        "base": base,
        "retention_tokens": start.retention.tokens,
        "discovery_sha256": start.template.calibration["sha256"],
        "retention_sha256": start.retention.sha256,
        "discovery": asdict(discovery),
        "arms": results,
        "random_minus_outside": start.retention.rise(nll["outside"], nll["random"]),
        "seconds": round(time.monotonic() - started),
    }
    write_report(summary, start.template, FRACTION, output)


def _start(args: Arguments, discovery: FunctionalNetworkConfig, output: Path) -> _Start:
    """Discover the networks, and measure the model before training."""
    import torch
    from transformers.utils import logging

    from ..data.embedded import question_routing, resolve_model, wikipedia_passages
    from ..discovery import discover_networks
    from ..evaluation.metrics import score_completions
    from ..evaluation.retention import RetentionText
    from ..neurons import find_neuron_sites
    from .models import load_model_and_tokenizer

    model_path = resolve_model(args.model_name_or_path)
    logging.set_verbosity_error()  # from here on the demo says itself what it does
    model, tokenizer = load_model_and_tokenizer(model_path, LoadingConfig())
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
            f"reliability {component.reliability:.2f}, above null {template.reliability_above_null(number):.2f}"
        )

    _say("2/4 Measuring the model before training: the new task, and general text (disjoint from the discovery's)")
    task = score_completions(model, tokenizer, test)
    nll = retention.sequence_nll(model)
    print(
        f"   exact match {task.exact_match:.2f}, NLL {task.nll:.2f} on {task.rows} rows; cross-entropy "
        f"{float(nll.sum()) / retention.tokens:.3f} on {retention.tokens} tokens"
    )
    return _Start(
        model_path=model_path,
        tokenizer=tokenizer,
        template=template,
        train=train,
        test=test,
        retention=retention,
        task=task,
        nll=nll,
        weights={name: value.clone() for name, value in model.state_dict().items()},
        sites=find_neuron_sites(model),
        probe=torch.tensor([tokenizer(row["prompt"])["input_ids"][:8] for row in test[:8]]),
    )


def _train_all(args: Arguments, start: _Start, output: Path) -> tuple[list[dict], dict[str, Any]]:
    """Train, score and reload every arm: their results, and the NLL of the retention text by arm."""
    from ..evaluation.reload import check_reload, last_logits

    results, adapters, expected, nll = [], {}, {}, {}
    for arm in ARMS:
        _say(f"3/4 Fine-tuning: {arm.name} ({len(start.train)} rows, learning rate {arm.learning_rate:g})")
        trainer = _train(arm, args, start, output)
        nll[arm.key] = start.retention.sequence_nll(trainer.model)
        adapters[arm.key] = output / "arms" / arm.key
        expected[arm.key] = last_logits(trainer.model, start.probe)
        results.append(_score(arm, trainer, start, nll[arm.key]))
        del trainer

    _say("4/4 Reloading every adapter in a fresh process")
    differences = check_reload(start.model_path, adapters, start.probe, expected)
    for result in results:
        result["reload_difference"] = differences[result["key"]]
        print(f"   {result['arm']}: largest difference of the logits {result['reload_difference']:g}")
    if any(differences.values()):
        raise RuntimeError(f"a reloaded adapter does not give the logits it was saved with: {differences}")
    return results, nll


def _score(arm: Arm, trainer, start: _Start, nll) -> dict[str, Any]:
    """What an arm has learnt and forgotten, and which neurons it has changed."""
    from ..evaluation.metrics import score_completions
    from ..export import changed_neurons

    task = score_completions(trainer.model, start.tokenizer, start.test)
    rise, *interval = start.retention.rise(start.nll, nll)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    changed, others = changed_neurons(start.sites, start.weights, trainer.model.merge_and_unload().state_dict())
    frozen_ok = None if arm.networks is None else changed == trainer.trainable_neurons and not others
    print(f"   exact match {task.exact_match:.2f}, NLL {task.nll:.2f}; general text {rise:+.4f} nats per token")
    if frozen_ok is False:
        raise RuntimeError(f"{arm.name}: the neurons that changed are not those that were selected")
    return {
        "arm": arm.name,
        "key": arm.key,
        "learning_rate": arm.learning_rate,
        "trained_parameters": trained,
        "changed_neurons": changed.count,
        "neurons": sum(site.width for site in start.sites),
        "frozen_bit_identical": frozen_ok,
        "exact_match": task.exact_match,
        "nll": task.nll,
        "retention_rise": rise,
        "retention_interval": interval,
    }


def _train(arm: Arm, args: Arguments, start: _Start, output: Path):
    """Fine-tune one arm; all arms see the same rows in the same order."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from ..training.trainer import FNSFTTrainer

    directory = output / "arms" / arm.key
    networks = peft_config = None
    if arm.networks is None:
        mlp_modules = [name for site in start.sites for name in site.layout.modules()]
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=mlp_modules, task_type="CAUSAL_LM")
    else:
        seed = {"ica_seed": args.seed} if arm.networks.get("ica_select") == "random" else {}
        networks = FunctionalNetworkConfig(ica_fraction=FRACTION, **seed, **arm.networks)
    trainer = FNSFTTrainer(
        model=start.model_path,
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
        train_dataset=Dataset.from_list(start.train),
        processing_class=start.tokenizer,
        peft_config=peft_config,
        network_config=networks,
        network_template=start.template if networks else None,
    )
    trainer.train()
    trainer.save_model()
    return trainer
