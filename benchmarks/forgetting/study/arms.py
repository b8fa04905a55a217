"""Arms: the ways of training that the study compares, all of them of the MLPs' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig

from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.experiments.arms import Arm
from fnsft_trl.training.retention import RetentionCallback
from fnsft_trl.training.trainer import FNSFTTrainer

from .learnt import Start
from .plan import BATCH, SCORED_STEPS, STEPS, WARMUP
from .shifts import shift


TARGETS = ("gate_proj", "up_proj", "down_proj")


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
        part (`str`): of the texts that are scored: `choose`, `confirm`, or `dissociation`.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    stage: str
    part: str

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
        steps (`int`): of a training.
        scored (`tuple[int, ...]`): steps at which it is scored.
    """

    model: str
    texts: Mapping[str, RetentionText]
    callbacks: tuple[TrainerCallback, ...] = ()
    steps: int = STEPS
    scored: tuple[int, ...] = SCORED_STEPS


def make_arm(setting: Setting, place: Place) -> Arm:
    """The arm of a cell.

    Raises:
        FNSFTError: there is no such way of training.
    """
    if setting.arm not in WAYS:
        raise FNSFTError(f"there is no arm {setting.arm!r}; there are: {', '.join(WAYS)}")
    way = WAYS[setting.arm]
    rows = shift(setting.task)

    def make_trainer(seed: int, directory: Path, template: Path | None) -> FNSFTTrainer:
        return _trainer(replace(setting, seed=seed), place, rows, way, directory)

    settings = asdict(setting) | {"way": way.__name__.strip("_"), "steps": place.steps, "batch": BATCH}
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
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    more: dict[str, Any] = {"model": place.model, "args": args, "train_dataset": train, "eval_dataset": test}
    trainer = way(setting, more | {"processing_class": tokenizer})
    retention = RetentionCallback(trainer, dict(place.texts))
    for series in retention.series:
        series.exact = True
    for callback in (retention, Start(trainer), ScoreAt(place.scored), *place.callbacks):
        trainer.add_callback(callback)
    return trainer


def _full(setting: Setting, arguments: dict[str, Any]) -> FNSFTTrainer:
    """All weights of the MLPs."""
    trainer = FNSFTTrainer(**arguments)
    hold_to_mlps(trainer.model)
    return trainer


def _lora(setting: Setting, arguments: dict[str, Any]) -> FNSFTTrainer:
    """LoRA of rank 8 on the MLPs."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return FNSFTTrainer(**arguments, peft_config=config)


WAYS: dict[str, Callable[[Setting, dict[str, Any]], FNSFTTrainer]] = {"full": _full, "lora": _lora}


def hold_to_mlps(model: nn.Module) -> None:
    """Freeze all but the weights of the MLPs' linear modules: what LoRA and protection act on, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(f"{target}.weight" for target in TARGETS)))


class ScoreAt(TrainerCallback):
    """Has a trainer evaluated at some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = state.global_step in self.steps
