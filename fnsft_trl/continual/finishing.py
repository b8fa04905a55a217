"""finish_stage: what is done with a model that a stage has trained: scored on all tasks, made ready to go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.generation import check_generates, check_scores_of_text
from ..export.merged import to_merged
from ..interventions.masking import masks_off
from ..neurons.sites import base_model
from ..training.trainer import FNSFTTrainer
from .growth import GrowingDirections, say_free, text_of
from .scorers import score_task
from .stages import MERGED_DIR
from .tasks import Task


GENERATING = ("rouge_l", "similarity")  # scorers that let a model answer


@dataclass(frozen=True)
class StageWork:
    """What a stage needs when it is trained.

    Attributes:
        merges (`bool`): whether its adapter is merged for the next one.
        grows (`bool`): whether the directions of its task are added to those that are protected.
        dims (`float` or `None`): how many of them, as `protect_dims`.
        tokens (`int`): of its rows that they are found on.
    """

    merges: bool = False
    grows: bool = False
    dims: float | None = None
    tokens: int = 8192


def finish_stage(
    tasks: Sequence[Task], works: Mapping[str, StageWork], trainer: FNSFTTrainer, directory: Path
) -> dict[str, Any]:
    """Score a trained model on all tasks, and write what the next stage goes on from.

    Args:
        tasks: to score.
        works: name of the folder of an arm and its stage, `ARM/STAGE` -> what it needs.
        trainer: after its training, saved.
        directory: the folder of the cell, `ARM/STAGE/seed-N`.

    Returns:
        `tasks`: name -> what [`score_task`] gives; `free`: of growing directions, how many are left; `overlap`:
        of O-LoRA, see [`OrthogonalFactors.overlap`].
    """
    work = works[f"{directory.parent.parent.name}/{directory.parent.name}"]
    found: dict[str, Any] = {"tasks": score_tasks(trainer.model, _tokenizer(trainer), tasks, trainer.args)}
    if trainer.penalties is not None and trainer.penalties.factors is not None:
        found["overlap"] = round(trainer.penalties.factors.overlap(trainer.model), 6)
    if work.grows:
        kept, text = trainer.protection.bases.kept, text_of(trainer.task_dataset, work.tokens)
        grown = GrowingDirections.after(kept, trainer.model, text, dims=work.dims)
        grown.save(directory)
        found["free"] = grown.free()
        say_free(found["free"])
    if work.merges:
        # In the precision that it was trained in: in that of the checkpoint small changes would be rounded away.
        precision = str(base_model(trainer.model).dtype).removeprefix("torch.")
        to_merged(directory, directory / MERGED_DIR, dtype=precision)
    return found


def score_tasks(model, tokenizer, tasks: Sequence[Task], args) -> dict[str, dict[str, Any]]:
    """The scores of a model on all tasks, by their names; forward masks are off.

    Args:
        model: a causal language model.
        tokenizer: with its prompt format.
        tasks: to score.
        args: of a trainer of it.
    """
    check_scorers(tasks)
    if any(task.config.scorer in GENERATING for task in tasks):
        check_generates(model, tokenizer)
    size = args.per_device_eval_batch_size
    with masks_off(model):
        return {
            task.name: score_task(model, tokenizer, task, batch_size=size, max_length=args.max_length)
            for task in tasks
        }


def check_scorers(tasks: Sequence[Task]) -> None:
    """Check that what the tasks are scored with is installed.

    Raises:
        FNSFTError: it is not.
    """
    if any(task.config.scorer == "rouge_l" for task in tasks):
        check_scores_of_text()


def _tokenizer(trainer: FNSFTTrainer):
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
