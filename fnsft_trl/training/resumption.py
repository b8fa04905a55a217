"""Resumption: what a run goes on from, and what another run will be able to go on from."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ..compat.transformers import TRAINER_STATE_FILE
from ..errors import FNSFTError
from ..ranks import Ranks
from ..template.storage import NETWORK_DIR
from .checkpoints import SCALER_FILE, find_checkpoint, mark, marked
from .run import Run
from .run_record import SELECTION_FILE
from .same_run import check_same, run_settings


class Resumption:
    """The checkpoints that a trainer reads and writes.

    Args:
        trainer ([`FNSFTTrainer`]): the trainer.
        run (`Run`): what it trains.
        given (`dict`): name -> what it was given in the place of its own optimizer, loss or collator.

    Attributes:
        is_writing (`bool`): whether the trainer writes a checkpoint at the moment.
    """

    def __init__(self, trainer, run: Run, given: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.run = run
        self.given = given
        self.is_writing = False

    def begin(self, asked: str | bool | None, mask_phases: list[dict]) -> str | bool | None:
        """Check that the training may go on from a checkpoint, before anything of it is loaded.

        Args:
            asked: as `Trainer.train` takes it; `None` is the checkpoint of the arguments, for the first training.
            mask_phases: of the `MaskScheduleCallback`.

        Returns:
            What to hand to `Trainer.train`.

        Raises:
            FNSFTError: it is not complete, or was written by a run that differs from this one.
        """
        checkpoint, self.run.checkpoint = self.run.checkpoint, None
        if asked is not None and str(asked) != str(checkpoint):
            checkpoint = find_checkpoint(asked, self.trainer.args, has_mark=True)
        if checkpoint is None:
            return asked
        check_same(checkpoint, self._settings(mask_phases))
        if self.trainer.accelerator.scaler is not None and not (checkpoint / SCALER_FILE).is_file():
            raise FNSFTError(
                f"{checkpoint} holds no state of the gradient scaler of fp16 ({SCALER_FILE}); name another one"
            )
        _check_generation(checkpoint, self.trainer.args)
        if self.run.guard is not None:
            self.run.guard.expected = (marked(checkpoint) or {}).get("frozen")
        return str(checkpoint)

    @contextmanager
    def writing(self, mask_phases: list[dict]) -> Iterator[None]:
        """Mark the checkpoint that is written in the block as complete, and delete older ones only then."""
        trainer, args = self.trainer, self.trainer.args
        directory = Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        limit, args.save_total_limit, self.is_writing = args.save_total_limit, None, True
        try:
            yield
        finally:
            args.save_total_limit, self.is_writing = limit, False
        trainer.accelerator.wait_for_everyone()
        ranks = Ranks()
        with ranks.together():
            self._mark(directory, mask_phases, limit)
        ranks.meet()

    def _mark(self, directory: Path, mask_phases: list[dict], limit: int | None) -> None:
        trainer, args = self.trainer, self.trainer.args
        if args.should_save:
            frozen = {"frozen": self.run.guard.fingerprint} if self.run.guard is not None else {}
            mark(directory, self._settings(mask_phases) | frozen)
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _settings(self, mask_phases: list[dict]) -> dict[str, Any]:
        return run_settings(self.trainer, given=self.given, mask_phases=mask_phases)


def _check_generation(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint between two generations of GRPO or RLOO: the answers that are in use are not in it.

    Raises:
        FNSFTError: with the steps at which a run can be resumed.
    """
    batches = getattr(args, "steps_per_generation", None)
    if batches is None:
        return
    batches *= args.num_iterations  # that are trained on the answers of one generation
    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE)).global_step
    every = math.lcm(batches, args.gradient_accumulation_steps) // args.gradient_accumulation_steps
    if step % every:
        raise FNSFTError(
            f"{checkpoint} was written amid the {every} steps that use the answers of one generation, and does not "
            f"hold them; resume from a step that is a multiple of {every} (set save_steps so)"
        )


def check_plain(asked: str | bool | None, output_dir: str) -> None:
    """Refuse the checkpoint of a run with networks where a training without any is to go on from it.

    Args:
        asked: as `Trainer.train` takes it.
        output_dir: of this run.
    """
    checkpoint = get_last_checkpoint(output_dir) if asked is True and Path(output_dir).is_dir() else asked
    if checkpoint and checkpoint is not True and (Path(checkpoint) / NETWORK_DIR / SELECTION_FILE).is_file():
        raise FNSFTError(
            f"{checkpoint} was written by a run with functional networks, and this run has none; give its "
            "network_config (its network options) again"
        )
