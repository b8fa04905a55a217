"""RetentionRun: the retention series of one training, measured together, logged together, and held to a budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import FNSFTError
from ..evaluation.config import PREFIX, metric_name
from ..evaluation.series import RetentionSeries
from ..interventions.masking import masks_off
from ..writing import written_whole
from .budget import Budget, RetentionBudgetExceeded
from .engines import Engine


logger = logging.get_logger(__name__)

BASE_FILE = "retention.safetensors"  # in a checkpoint: what the base predicts, where it cannot be had again

_STATE = "retention"  # in the state of the Trainer, which checkpoints hold


class RetentionRun:
    """What is measured in one call of `train`.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer.
        series (`list[RetentionSeries]`): what is measured.
        budget ([`Budget`], *optional*): what their rise is held to.

    Attributes:
        is_over (`bool`): whether what was measured last passes the budget.
        done (`str`): what was done about the budget, in words.
        failure (`RetentionBudgetExceeded` or `None`): at the end, if no state kept to the budget.

    Raises:
        FNSFTError: two series have one name, the best model is to be chosen by one that is not measured, or a
            rollback would have to copy weights that are sharded.
    """

    def __init__(self, trainer, series: Sequence[RetentionSeries], budget: Budget | None) -> None:
        self.trainer = trainer
        self.series = list(series)
        self.budget = budget
        self.is_over = False
        self.done = "no budget" if budget is None else f"nothing, within the budget of {budget.nats:g}"
        self.failure: RetentionBudgetExceeded | None = None
        self._step: int | None = None  # of the last measurement
        self._now = ""  # the same, in words
        self._weights_step = 0  # at which the weights of now were trained
        names = [each.name for each in self.series]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise FNSFTError(f"two retention series are named {repeated[0]!r}; give each a name of its own")
        self._check_metric(trainer.args)
        engine = Engine.of_trainer(trainer)
        if engine is not None and budget is not None and budget.action == "rollback":
            engine.check(["rollback"])

    def _check_metric(self, args: TrainingArguments) -> None:
        wanted = (args.metric_for_best_model or "").removeprefix("eval_")
        if not wanted.startswith(PREFIX):
            return
        known = [metric_name(each.name, measure) for each in self.series for measure in each.measures]
        if wanted not in known:
            raise FNSFTError(
                f"metric_for_best_model is {args.metric_for_best_model!r}, which is not measured; it must be one of: "
                f"{', '.join(known)}"
            )
        if args.greater_is_better:  # transformers' guess for all that does not end in `loss`
            args.greater_is_better = False
            self._say(f"the best model is that of the lowest {wanted}")

    def begin(self, state: TrainerState, checkpoint: Path) -> None:
        """Measure the base, or take it from the run that is resumed, and what the weights are at now.

        Args:
            state: of the trainer.
            checkpoint: that is resumed from, if one is.

        Raises:
            FNSFTError: the base is not known; or the budget is passed already.
        """
        resumed = state.global_step > 0
        entries = state.stateful_callbacks.get(_STATE, {}) if resumed else {}
        is_base = not resumed and not any(each.is_of(self.trainer.model) for each in self.series)
        with masks_off(self.trainer.model):
            for each in self.series:
                if resumed:
                    self._resume(each, entries, checkpoint)
                elif not each.is_of(self.trainer.model):
                    each.begin(self.trainer.model, title=self._title(each))
        state.stateful_callbacks[_STATE] = {each.name: each.state() for each in self.series}
        for each in self.series:
            name = each.name or "general text"
            kind = "exact, from the base itself" if each.kl_kind == "exact" else "top-k, a lower bound"
            self._say(f"retention: {name}: {each.text.tokens} tokens, base {each.base:.4f} nats, KL {kind}")
        about = {metric_name(each.name, "base"): each.base for each in self.series if "rise" in each.measures}
        about |= {metric_name(each.name, "tokens"): each.text.tokens for each in self.series}
        self._measure(state, about, is_known=is_base)
        if self.budget is None:
            return
        if self.is_over:
            said = f"{self._passing()} before this training: the budget of {self.budget.nats:g} nats is passed"
            if self.budget.action != "warn":
                raise FNSFTError(
                    f"{said}; resume from an earlier checkpoint, start from the base, or set a larger retention_budget"
                )
            self._say(said)
        else:
            self.budget.keep(self.trainer.model, state.global_step)
        if self.trainer.args.eval_strategy == "no":
            self._say("retention_budget without an eval_strategy (steps or epoch) is looked at only at the end")

    def _resume(self, each: RetentionSeries, entries: dict[str, Any], checkpoint: Path) -> None:
        if each.name not in entries:
            shown = f" for the series {each.name!r}" if each.name else ""
            raise FNSFTError(
                f"the checkpoint was written without a RetentionCallback{shown}, so the cross-entropy of the model "
                "before training is not known; start the run anew with the callback"
            )
        file, beginning = checkpoint / BASE_FILE, f"{each.name}/"
        stored = load_file(file) if file.is_file() else {}
        tensors = {name.removeprefix(beginning): t for name, t in stored.items() if name.startswith(beginning)}
        each.resume(entries[each.name], tensors or None, self.trainer.model, title=self._title(each))

    def save(self, checkpoint: Path) -> None:
        """Write what the base predicts into a checkpoint, where it could not be had again."""
        tensors = {f"{each.name}/{name}": value for each in self.series for name, value in each.tensors().items()}
        if tensors:
            with written_whole(checkpoint / BASE_FILE) as scratch:
                save_file(tensors, scratch)

    def evaluate(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        """Measure, once at each step, put the values among those of an evaluation, and look at the budget."""
        if state.global_step != self._step:
            self._measure(state)
            self._heed(state, control)
        metrics.update({f"eval_{name}": value for name, value in self.values().items()})

    def values(self) -> dict[str, float]:
        """What was measured last, by its name in the log."""
        return {name: value for each in self.series for name, value in each.named().items()}

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Measure what the training ends with, put a state within the budget back if need be, and say so."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        budget, was_over = self.budget, self.is_over
        if best is not None or state.global_step != self._step:
            self._measure(state)
        if best is not None:
            self._weights_step = state.best_global_step
            stopped = "stopped; " if was_over and budget.action != "warn" else ""
            within = f" within the budget of {budget.nats:g}" if budget is not None else ""
            self.done = f"{stopped}the best checkpoint{within} is loaded, of step {self._weights_step}"
        if budget is not None:
            if self.is_over and budget.action == "rollback":
                self._roll_back(state)
            elif self.is_over:
                self.done = (
                    f"{'stopped' if budget.action == 'stop' else 'nothing'}, over {budget.nats:g}; {self._passing()}"
                )
            budget.forget()
        self._say(self.summary())

    def _roll_back(self, state: TrainerState) -> None:
        budget, passing = self.budget, self._passing()
        budget.restore(self.trainer.model)
        self._measure(state)
        self._weights_step = budget.kept_step
        self.done = f"rolled back to step {budget.kept_step}, the last within the budget of {budget.nats:g}; {passing}"
        if budget.kept_step == 0:
            self.failure = RetentionBudgetExceeded(
                f"no measurement of this training is within the retention_budget of {budget.nats:g} nats: {passing}; "
                "the model is again what it was before. Train with a lower learning_rate or fewer neurons, evaluate "
                "more often (eval_steps), or set a larger retention_budget"
            )

    def _measure(self, state: TrainerState, about: dict[str, float] | None = None, *, is_known: bool = False) -> None:
        """Measure all series and log them as one entry; not those of a base that has just been measured."""
        if not is_known:
            with masks_off(self.trainer.model):
                for each in self.series:
                    each.measure(self.trainer.model, title=self._title(each))
        self._step = self._weights_step = state.global_step
        self._now = f"at step {state.global_step}"
        self.is_over = self.budget is not None and bool(self.budget.passed_by(self.series))
        self.trainer.log({**(about or {}), **self.values()})

    def _heed(self, state: TrainerState, control: TrainerControl) -> None:
        budget = self.budget
        if budget is None or not self.trainer.is_in_train:
            return
        if not self.is_over:
            budget.keep(self.trainer.model, state.global_step)
            return
        does = {"warn": "the training goes on", "stop": "the training stops"}
        does["rollback"] = f"the training stops, and step {budget.kept_step} comes back"
        self._say(f"the retention_budget of {budget.nats:g} nats is passed: {self._passing()}; {does[budget.action]}")
        if budget.action != "warn":
            control.should_training_stop = True
        if budget.action == "rollback":
            control.should_save = False

    def _passing(self) -> str:
        passed = self.budget.passed_by(self.series)
        return ", ".join(f"{e.name or 'the text'} rose by {e.values['rise']:+.4f}" for e in passed) + f" {self._now}"

    def _title(self, each: RetentionSeries) -> str | None:
        """What the progress bar of a measurement says; `None` where none is shown."""
        shown = self.trainer.is_world_process_zero() and not self.trainer.args.disable_tqdm
        return f"retention {each.name}".strip() if shown else None

    def _say(self, line: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(line)

    @property
    def weights_step(self) -> int:
        """The step at which the weights of now were trained."""
        return self._weights_step

    def summary(self) -> str:
        """What was learnt, what was lost and what was done, in one line."""
        lost = [
            f"{each.name or 'general text'} {each.values['rise']:+.4f} (KL {each.values['kl']:.4f})"
            for each in self.series
            if "rise" in each.measures
        ]
        lost += [f"{each.name} KL {each.values['kl']:.4f}" for each in self.series if "rise" not in each.measures]
        return f"learnt: {self._learnt()}; lost, in nats per token: {', '.join(lost)}; done: {self.done}"

    def _learnt(self) -> str:
        """The first and the last loss up to the step of the weights, of evaluations if there are any."""
        history = [entry for entry in self.trainer.state.log_history if entry["step"] <= self._weights_step]
        names = [name for entry in history for name in entry if name.startswith("eval_") and name.endswith("_loss")]
        name = names[0] if names else "loss"
        found = [(entry["step"], entry[name]) for entry in history if name in entry]
        if not found:
            return "not measured, no loss was logged" if self._weights_step else "nothing"
        (first, before), (last, after) = found[0], found[-1]
        return f"{name} {before:.4f} at step {first}" + (f" -> {after:.4f} at step {last}" if last > first else "")
