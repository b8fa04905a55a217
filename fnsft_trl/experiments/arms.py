"""Arm: one way of fine-tuning, trained and scored by one function."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .. import __version__
from ..evaluation.generation import check_generates
from ..evaluation.metrics import RowScores
from ..evaluation.series import RetentionSeries
from ..interventions.masking import masks_off
from ..template.template import FunctionalNetworkTemplate
from ..training.budget import RetentionBudgetExceeded
from ..training.retention import callbacks_of, retention_of
from ..training.same_run import data_text, networks_text
from ..training.trainer import FNSFTTrainer
from .held_out import HeldOut


_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "numpy")


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning, that can be trained with any seed.

    Attributes:
        name (`str`): of the arm, which is also that of its directory.
        task (`str`): what is learnt, in a word or two: the name of the data.
        make_trainer (`Callable`): makes its trainer, with an `eval_dataset` to score, from a seed, the directory to
            write into, and the template of its networks (`None`: what the trainer finds itself).
        settings (`dict`): all that was asked for, as JSON values; arms are compared by it, and an experiment that goes
            on notices what has changed of it.
        sources (`dict[str, str]`): hash of every local file or folder that it reads, by its path.
        discover (`Callable` or `None`): finds its networks, given a seed and a directory to work in; `None` where it
            needs none, or has a template.
        networks (`str`): what a discovery depends on: arms of which it is the same share one.
        networks_by_seed (`bool`): whether the text of the discovery depends on the seed.
        max_new_tokens (`int` or `None`): the longest answer that it is let generate, for BLEU and ROUGE; none by
            default.
        change (`Callable` or `None`): what it does in the place of a training, to the model of its trainer, given the
            directory to write into too; by default it trains.
    """

    name: str
    task: str
    make_trainer: Callable[[int, Path, Path | None], FNSFTTrainer]
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    discover: Callable[[int, Path], FunctionalNetworkTemplate] | None = None
    networks: str = ""
    networks_by_seed: bool = False
    max_new_tokens: int | None = None
    change: Callable[[FNSFTTrainer, Path], None] | None = None


class _Points(TrainerCallback):
    """What was learnt and what was lost, at the start of a training, at each evaluation and at its end."""

    def __init__(self, trainer: FNSFTTrainer, held_out: HeldOut) -> None:
        self.trainer = trainer
        self.held_out = held_out
        self.found: list[dict[str, Any]] = []
        self.base_nll: dict[str, list[float]] = {}  # of the sequences of each retention series, before training
        self.last: list[RowScores] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.measure()
        self.base_nll = {name: list(series.nll) for name, series in self.series().items()}

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self.trainer.is_in_train:
            self.measure()

    def measure(self) -> None:
        """Add a point; without forward masks, which the saved model does not carry."""
        trainer = self.trainer
        step = trainer.state.global_step
        with masks_off(trainer.model):
            self.last = self.held_out.score(trainer.model, batch_size=trainer.args.per_device_eval_batch_size)
        summary = self.held_out.summary(self.last)
        self.found = [point for point in self.found if point["step"] != step]
        self.found.append({"step": step, "learning": summary["nll"], **summary, **lost(self.series())})

    def finish(self) -> None:
        """Measure what the training has left, where that may not be what was measured last."""
        trainer = self.trainer
        may_be_other = trainer.args.load_best_model_at_end or any(c.budget for c in callbacks_of(trainer))
        if may_be_other or self.found[-1]["step"] != trainer.state.global_step:
            self.measure()

    def series(self) -> dict[str, Any]:
        """The retention series, by name."""
        run = retention_of(self.trainer)
        return {} if run is None else {series.name: series for series in run.series}


def train_and_score(
    arm: Arm,
    seed: int,
    directory: Path,
    *,
    template: Path | None = None,
    also: Callable[[FNSFTTrainer, Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train an arm with a seed, save what it gives, and score it.

    Args:
        arm: the arm.
        seed: of the training; of random neurons too, where the arm draws some.
        directory: where the model goes.
        template: the directory of its networks.
        also: gives more to record of the trained model, which it may use up.

    Returns:
        The cell, as JSON values. It holds no date and no duration: the same arm, seed and data give the same cell.
        `points` say at each `step` what was learnt and what was lost; the last is that of the saved model. `learning`
        is the mean negative log-likelihood of a held-out answer, in nats, and lower is better. `retention` is by
        series, and `kl_sums` the KL of each sequence.
    """
    trainer = arm.make_trainer(seed, directory, template)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    held_out = HeldOut.of(trainer.eval_dataset, tokenizer)
    if arm.max_new_tokens is not None:
        check_generates(trainer.model, tokenizer)
    points = _Points(trainer, held_out)
    trainer.add_callback(points)
    budget = _train(trainer) if arm.change is None else _change(arm, trainer, directory)
    points.finish()
    trainer.save_model(trainer.args.output_dir)
    trainer.create_model_card()
    cell = {
        "task": arm.task,
        "arm": arm.name,
        "seed": seed,
        "learning_rate": trainer.args.learning_rate,
        "points": points.found,
        "scores": held_out.summary(points.last) | _answers(arm, trainer, tokenizer, held_out),
        "scored": {"rows": len(held_out.rows), "left_out": held_out.left_out, "answers": held_out.has_answers},
        "masked": _masked(trainer, held_out),
        "budget": budget,
        "trained": _trained(trainer),
        "rows": {"nll": held_out.nll(points.last), "exact_match": [row.is_exact for row in points.last]},
        "retention": {name: _retention(series, points.base_nll[name]) for name, series in points.series().items()},
        "train_data": data_text(trainer.train_dataset, None),
        "eval_data": held_out.sha256,
        "template": None if template is None else template.name,
        "networks": None if trainer.network_template is None else networks_text(trainer.network_template),
        "device": trainer.args.device.type,
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}),
        **{"settings": arm.settings, "sources": arm.sources, "versions": versions()},
    }
    cell["also"] = {} if also is None else also(trainer, directory)
    return cell


def lost(series: Mapping[str, RetentionSeries]) -> dict[str, dict[str, Any]]:
    """What was measured last of retention series, as it stands in a point of a cell.

    Args:
        series: by name.

    Returns:
        `retention`: series -> measure -> nats per token; and `kl_sums`: series -> KL of each sequence, summed over its
        tokens, to six digits.
    """
    return {
        "retention": {name: dict(each.values) for name, each in series.items()},
        "kl_sums": {name: [float(f"{kl:.6g}") for kl in each.kl_sums] for name, each in series.items()},
    }


def _train(trainer: FNSFTTrainer) -> str | None:
    """Train, and say what was done about the budget of retention, if there is one."""
    failure = None
    try:
        trainer.train()
    except RetentionBudgetExceeded as error:  # the model is its base again, and that is its result
        failure = str(error)
    run = retention_of(trainer)
    return None if run is None or run.budget is None else failure or run.done


def _change(arm: Arm, trainer: FNSFTTrainer, directory: Path) -> None:
    """Have an arm change its model without a training, which counts as one step: measured before it and after it."""
    told = (trainer.args, trainer.state, trainer.control)
    trainer.callback_handler.on_train_begin(*told)
    arm.change(trainer, directory)
    trainer.state.global_step = 1
    trainer.callback_handler.on_train_end(*told)


def versions() -> dict[str, str]:
    """The versions of what decides the numbers of a cell."""
    found = {"fnsft-trl": __version__, "python": platform.python_version()}
    return found | {package: version(package) for package in _PACKAGES}


def _masked(trainer: FNSFTTrainer, held_out: HeldOut) -> dict[str, float] | None:
    """The scores under the forward mask that the arm trains with, if one is on."""
    if trainer.mask_handle is None or not trainer.mask_handle.enabled:
        return None
    return held_out.summary(held_out.score(trainer.model, batch_size=trainer.args.per_device_eval_batch_size))


def _answers(arm: Arm, trainer: FNSFTTrainer, tokenizer, held_out: HeldOut) -> dict[str, float]:
    """The scores of generated answers, if they are asked for."""
    if arm.max_new_tokens is None:
        return {}
    size = trainer.args.per_device_eval_batch_size
    with masks_off(trainer.model):
        return held_out.answers(trainer.model, tokenizer, max_new_tokens=arm.max_new_tokens, batch_size=size)


def _trained(trainer: FNSFTTrainer) -> dict[str, Any]:
    """What trained, in numbers."""
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    plan, mask = trainer.plan, trainer.trainable_neurons
    if plan is None:
        return {"parameters": parameters, "method": "plain", "neurons": None, "selected": None, "mask_mode": None}
    return {
        "parameters": parameters,
        "method": plan.method,
        "neurons": {"count": mask.count, "of": sum(map(len, mask.layers.values())), "sha256": mask.sha256},
        "selected": {"count": trainer.neuron_mask.count, "sha256": trainer.neuron_mask.sha256},
        "mask_mode": plan.mask_mode,
    }


def _retention(series, base_nll: list[float]) -> dict[str, Any]:
    """A series at the end, with the negative log-likelihood of each of its sequences before and after."""
    return {
        "tokens": series.text.tokens,
        "sha256": series.text.sha256,
        "base": series.base,
        "kl": series.kl_kind,
        "sequence_tokens": [len(ids) - 1 for ids in series.text.sequences],
        "base_nll": base_nll,
        "nll": list(series.nll),
    }
