"""Arms: the ways of training that the study compares, all of them of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig

from fnsft_trl.constraints.protection import protect_weights
from fnsft_trl.constraints.trained_maps import trained_maps
from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.experiments.arms import Arm
from fnsft_trl.training.config import ReplayConfig
from fnsft_trl.training.retention import RetentionCallback
from fnsft_trl.training.trainer import FNSFTTrainer

from .bases import Bases, Basis
from .learnt import Start
from .plan import BASES, BATCH, BY_SCALES, DOMAINS, EVERYWHERE, REPLAYED, SCORED_STEPS, STEPS, WARMUP
from .shifts import shift


TARGETS = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def targets_of(task: str) -> tuple[str, ...]:
    """Which linear modules of a layer train in all arms of a shift."""
    return TARGETS + ATTENTION if task.endswith(EVERYWHERE) else TARGETS


@dataclass(frozen=True)
class Setting:
    """
    What a cell is, but for what it finds.

    Attributes:
        task (`str`): the shift.
        arm (`str`): the way of training.
        learning_rate (`float`): of the training.
        seed (`int`): of the training.
        stage (`str`): of the study, in which it is needed first.
        part (`str`): of the texts that are scored: `choose`, `screen`, `confirm`, or `dissociation`.
        path (`str` or `None`): the one from base to trained on which it is scored; on both by default.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    stage: str
    part: str
    path: str | None = None

    @property
    def key(self) -> tuple:
        """By which its cell is found: the stage says only who asked for it first."""
        return (self.part, self.task, self.arm, self.learning_rate, self.seed)

    @property
    def title(self) -> str:
        """What the log calls it."""
        return f"{self.stage}: {self.task}, {self.arm} at {self.learning_rate:g}, seed {self.seed}"


KEY = ("part", "task", "arm", "learning_rate", "seed")


@dataclass(frozen=True)
class Place:
    """
    What cells share: a model, and what is scored and waited for.

    Attributes:
        model (`str`): its directory.
        texts (`dict[str, RetentionText]`): text to score, by name.
        callbacks (`tuple`): more callbacks of a trainer.
        bases ([`Bases`] or `None`): the directions to protect, for the arms that protect any.
        steps (`int`): of a training.
        scored (`tuple[int, ...]`): steps at which it is scored.
        device (`str`): where it is trained and scored: `cpu`, or the type of the accelerator.
    """

    model: str
    texts: Mapping[str, RetentionText]
    callbacks: tuple[TrainerCallback, ...] = ()
    bases: Bases | None = None
    steps: int = STEPS
    scored: tuple[int, ...] = SCORED_STEPS
    device: str = "cpu"


def make_arm(setting: Setting, place: Place) -> Arm:
    """The arm of a cell.

    Raises:
        FNSFTError: there is no such way of training.
    """
    way = way_of(setting.arm)
    rows = shift(setting.task)

    def make_trainer(seed: int, directory: Path, template: Path | None) -> FNSFTTrainer:
        return _trainer(replace(setting, seed=seed), place, rows, way, directory)

    settings = asdict(setting) | {"steps": place.steps, "batch": BATCH}
    return Arm(setting.arm, setting.task, make_trainer, settings)


def _trainer(setting: Setting, place: Place, rows, way: Callable, directory: Path) -> FNSFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    train, test = (Dataset.from_list(part) for part in rows)
    args = SFTConfig(
        output_dir=str(directory),
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        weight_decay=0.0,
        max_steps=place.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=16,
        max_length=128,
        seed=setting.seed,
        data_seed=setting.seed,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        use_cpu=place.device == "cpu",
        bf16=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    more: dict[str, Any] = {"model": place.model, "args": args, "train_dataset": train, "eval_dataset": test}
    trainer = way(setting, place, more | {"processing_class": tokenizer})
    scored = place.scored[-1:] if setting.path == BY_SCALES else place.scored
    retention = RetentionCallback(trainer, dict(place.texts))
    for series in retention.series:
        series.exact = True
    for callback in (retention, Start(trainer), ScoreAt(scored), *place.callbacks):
        trainer.add_callback(callback)
    return trainer


Way = Callable[[Setting, Place, dict[str, Any]], FNSFTTrainer]


def _full(setting: Setting, place: Place, arguments: dict[str, Any]) -> FNSFTTrainer:
    """All weights of the linear modules of the shift."""
    trainer = FNSFTTrainer(**arguments)
    hold_to(trainer.model, targets_of(setting.task))
    return trainer


def _lora(setting: Setting, place: Place, arguments: dict[str, Any]) -> FNSFTTrainer:
    """LoRA of rank 8 on them."""
    targets = list(targets_of(setting.task))
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return FNSFTTrainer(**arguments, peft_config=config)


def _replay(setting: Setting, place: Place, arguments: dict[str, Any]) -> FNSFTTrainer:
    """Full, with pieces of the texts that are to be kept as a quarter of every batch."""
    replay = ReplayConfig(replay_datasets=[f"kept={place.bases.pieces_file()}"], replay_share=REPLAYED)
    return _full(setting, place, arguments | {"replay": replay})


def _protected(basis: Callable[[Bases, Setting], Basis], targets: tuple[str, ...] | None = None) -> Way:
    """Full, of some modules or of all those of the shift, with D U = 0 after every step."""

    def make(setting: Setting, place: Place, arguments: dict[str, Any]) -> FNSFTTrainer:
        trainer = FNSFTTrainer(**arguments)
        hold_to(trainer.model, targets or targets_of(setting.task))
        protect(trainer, basis(place.bases, setting))
        return trainer

    return make


def way_of(arm: str) -> Way:
    """How an arm trains.

    Raises:
        FNSFTError: there is no such arm.
    """
    if arm in WAYS:
        return WAYS[arm]
    kind, _, domain = arm.partition(" of ")
    if kind in BASES and domain.partition(" ")[0] in DOMAINS:
        name, _, directions = domain.partition(" ")
        return _protected(lambda bases, setting: bases.of_domain(kind, name, int(directions)), ("down_proj",))
    if arm.startswith(NETWORKS):
        return _protected(lambda bases, setting: bases.networks(int(arm.removeprefix(NETWORKS))))
    raise FNSFTError(f"there is no arm {arm!r}; there are: {', '.join(WAYS)}")


NETWORKS = "networks "  # and how many of their directions
WAYS: dict[str, Way] = {
    "full": _full,
    "lora": _lora,
    "replay": _replay,
    "subspace": _protected(lambda bases, setting: bases.subspace(setting.seed)),
    "random": _protected(lambda bases, setting: bases.random(setting.seed)),
    "screen": _full,
}


def protect(trainer: FNSFTTrainer, basis: Basis) -> None:
    """Keep what trains from changing along directions, from now on."""
    maps, left = trained_maps(trainer.model, None, set(basis))
    if left:
        raise FNSFTError(f"{left[0]} trains and has no directions; hold the training to linear modules")
    protect_weights(maps, basis).attach(trainer.create_optimizer())


def hold_to(model: nn.Module, targets: Sequence[str]) -> None:
    """Freeze all but the weights of linear modules of some names, which LoRA and protection act on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(f"{target}.weight" for target in targets)))


class ScoreAt(TrainerCallback):
    """Has a trainer evaluated at some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = state.global_step in self.steps
