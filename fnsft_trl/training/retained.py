"""RetainingTrainer: a Trainer that measures how much of general texts it loses, and keeps to a budget."""

from pathlib import Path

from .penalized import PenalizedTrainer
from .retention import callbacks_of, retention_of
from .retention_texts import RetentionTexts


class RetainingTrainer(PenalizedTrainer):
    """Trainer with retention series.

    Args:
        retention ([`RetentionTexts`], *optional*): what is measured.
        args, kwargs: those of the trainer that it goes in front of.
    """

    def __init__(self, *args, retention: RetentionTexts | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if retention is not None:
            retention.add_to(self)

    @property
    def task_dataset(self):
        """The rows of the task among those that are trained."""
        return self.train_dataset

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's.

        Raises:
            RetentionBudgetExceeded: no measurement kept to the budget; the model is what it was before.
        """
        for callback in callbacks_of(self):
            callback.raises = False  # not before the training has ended in order
            given = isinstance(resume_from_checkpoint, str)
            callback.checkpoint = Path(resume_from_checkpoint) if given else None
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        run = retention_of(self)
        if run is not None and run.failure is not None:
            raise run.failure
        return result

    def _determine_best_metric(self, metrics, trial) -> bool:
        # A state over the budget is never the best one.
        run = retention_of(self)
        return False if run is not None and run.is_over else super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; a checkpoint holds what the base predicts on retention texts, where that is stored."""
        super().save_model(output_dir, _internal_call)
        run = retention_of(self)
        is_checkpoint = _internal_call and output_dir is not None  # a push names no directory
        if run is not None and is_checkpoint and self.args.should_save:
            run.save(Path(output_dir))
