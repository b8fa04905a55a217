"""RetentionCallback: how much general ability is left, while training goes on. It works with any Trainer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import FNSFTError
from ..evaluation.config import MEASURES, TASK
from ..evaluation.retention import RetentionText
from ..evaluation.series import RetentionSeries
from ..neurons.sites import base_model
from .budget import Budget
from .retention_run import BASE_FILE, RetentionRun


class RetentionCallback(TrainerCallback):
    """Measures how much of a general text a model still predicts as its base did, and can end a run by it.

    It measures each series at the start of the training, at each evaluation and at its end, and again when the best
    model has been loaded. These numbers go to `trainer.log`, and with `eval_` in front into what `evaluate` returns.
    So `metric_for_best_model="retention/wiki/rise"` works:

    - `retention/wiki/cross_entropy`: the mean token cross-entropy on the text, in nats;
    - `retention/wiki/rise`: its rise over the base, the model before training;
    - `retention/wiki/kl`: KL(base || trained) on the same tokens, in nats per token. It is exact where the base can be
      had by switching an adapter off. Otherwise its 64 most probable tokens and a rest give a lower bound.

    The base and the number of tokens are logged once (`retention/wiki/base`, `/tokens`). All is measured with forward
    masks off, for the trained weights carry none; several processes share the sequences.

    A callback has one series, or several by name. All callbacks of a trainer are measured together and logged in one
    entry. The first series without a name logs `retention/rise`, the second `retention/2/rise`, and so on.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model is measured. Add the callback with `trainer.add_callback`.
        texts (iterable of `str`, messages or rows, `RetentionText`, or `dict` of these by name):
            General text, disjoint from training and discovery. With a `dict`, each is a series.
        name (`str`, *optional*):
            Of the series. `task` is that of the prompts that are trained on: of it only `kl` is logged.
        max_tokens (`int`, *optional*, defaults to `8192`):
            Number of tokens to score.
        batch_size (`int`, *optional*, defaults to `8`):
            Sequences of up to 256 tokens in a forward pass; fewer of longer ones.
        budget (`float`, *optional*):
            The rise, in nats per token, that no series of the trainer may pass.
        on_budget (`str`, *optional*, defaults to `"rollback"`):
            What is done when one passes it: `"rollback"`, `"stop"` or `"warn"`.

    Attributes:
        series (`list[RetentionSeries]`): its series.
        text (`RetentionText`): the text of the first.
        base (`float` or `None`): cross-entropy of the base on it, in nats per token, once the training has begun.
        run (`RetentionRun` or `None`): what was measured in the last training; of the first callback of a trainer.

    Raises:
        FNSFTError: the text holds no tokens, or the budget is none; when training begins, two series of one name, or
            a checkpoint of another text.
        RetentionBudgetExceeded: at the end of a training of which no measurement keeps to the budget.
    """

    def __init__(
        self,
        trainer: Trainer,
        texts: Iterable | RetentionText | Mapping[str, Iterable | RetentionText],
        *,
        name: str | None = None,
        max_tokens: int = 8192,
        batch_size: int = 8,
        budget: float | None = None,
        on_budget: str = "rollback",
    ) -> None:
        if isinstance(texts, Mapping) and (name is not None or not texts):
            raise FNSFTError("texts by name are one or more, and have their own names; drop name, or give one text")
        base = base_model(trainer.model)
        if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None:
            kind = type(base).__name__
            raise FNSFTError(f"retention is measured by the next token, which a {kind} does not predict; drop it")
        self.trainer = trainer
        self.budget = None if budget is None else Budget(budget, on_budget)
        named = texts if isinstance(texts, Mapping) else {name or "": texts}
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self.series = []
        for label, text in named.items():
            if not isinstance(text, RetentionText):
                shown = f"the text {label}".strip()
                text = RetentionText.from_texts(text, tokenizer, max_tokens=max_tokens, name=shown)
            measures = ("kl",) if label == TASK else MEASURES
            self.series.append(RetentionSeries(text, name=label, batch_size=batch_size, measures=measures))
        self.run: RetentionRun | None = None
        self.checkpoint: Path | None = None  # that a training is resumed from, where it is known
        self.raises = True  # whether it is this callback that ends a failed run
        self._has_names = name is not None or isinstance(texts, Mapping)

    @property
    def text(self) -> RetentionText:
        """The text of the first series."""
        return self.series[0].text

    @property
    def base(self) -> float | None:
        """Cross-entropy of the base, in nats per token; `None` before the training has begun."""
        return self.series[0].base

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = callbacks_of(self.trainer)
        self.run = None
        if callbacks[0] is not self:
            return
        unnamed = [callback.series[0] for callback in callbacks if not callback._has_names]
        for number, series in enumerate(unnamed, 1):
            series.name = "" if number == 1 else str(number)
        every = [series for callback in callbacks for series in callback.series]
        self.run = RetentionRun(self.trainer, every, _common_budget(callbacks))
        # In front, so that what others look for among the metrics of an evaluation (early stopping) is there.
        all_callbacks = self.trainer.callback_handler.callbacks
        all_callbacks.remove(self)
        all_callbacks.insert(0, self)
        self.run.begin(state, self.checkpoint or self._directory(args, state))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.run is not None:
            self.run.evaluate(state, control, {} if metrics is None else metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run is not None and args.should_save:
            directory = self._directory(args, state)
            if directory.is_dir() and not (directory / BASE_FILE).exists():
                self.run.save(directory)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run is not None:
            self.run.end(args, state)
            if self.raises and self.run.failure is not None:
                raise self.run.failure

    @staticmethod
    def _directory(args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def callbacks_of(trainer) -> list[RetentionCallback]:
    """The retention callbacks of a trainer, in their order; the first measures for all."""
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, RetentionCallback)]


def retention_of(trainer) -> RetentionRun | None:
    """What was measured in the last training of a trainer; `None` without a retention callback."""
    return next((each.run for each in callbacks_of(trainer) if each.run is not None), None)


def _common_budget(callbacks: list[RetentionCallback]) -> Budget | None:
    budgets = [callback.budget for callback in callbacks if callback.budget is not None]
    kinds = {(budget.nats, budget.action) for budget in budgets}
    if len(kinds) > 1:
        shown = ", ".join(f"{nats:g} ({action})" for nats, action in sorted(kinds))
        raise FNSFTError(f"the retention callbacks of one trainer have different budgets: {shown}; give one of them")
    return Budget(*kinds.pop()) if kinds else None
