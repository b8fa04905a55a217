"""WatchedTrainer: a Trainer that does not end well when it has learnt nothing, or broken what it trains."""

from contextlib import nullcontext

import torch
from transformers.utils import logging

from ..constraints import plain_optimizer
from ..errors import FNSFTError
from .batches import BatchCount
from .divergence import DivergenceGuard, check_weights
from .full_eval import weights_kept
from .hub import HubTrainer


logger = logging.get_logger(__name__)


class WatchedTrainer(HubTrainer):
    """Trainer, with errors where its numbers would mean nothing. It goes in front of any other kind of trainer.

    A run ends in an error when its loss or gradients are not finite. (transformers logs a loss of 0.0 then, and goes
    on.) So it does when no batch of the training, or of an evaluation, holds a label.

    Args:
        args, kwargs: those of the trainer that it goes in front of.

    Attributes:
        keeps_weights (`bool`): whether evaluations outside of training leave the weights as they are under
            `bf16_full_eval` and `fp16_full_eval`, which cast them.
    """

    keeps_weights = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._trained_on, self._evaluated_on = BatchCount(), BatchCount()
        self._divergence = DivergenceGuard(self)
        self.add_callback(self._divergence)

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; its steps are watched."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._divergence.watch(plain_optimizer(optimizer))
        return optimizer

    def train(self, *args, **kwargs):
        """As the parent's.

        Raises:
            FNSFTError: the run diverged, or no batch held a label.
        """
        self._trained_on = BatchCount()
        result = super().train(*args, **kwargs)
        self._check_labels(self._trained_on, "training")
        return result

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """As the parent's; labels are counted, and a loss that is not finite is noted."""
        self._trained_on.add(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._divergence.see_loss(loss)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As the parent's; labels are counted, and losses that are not finite."""
        self._evaluated_on.add(inputs)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if result[0] is not None:
            self._evaluated_on.add_loss(result[0])
        return result

    def evaluation_loop(self, dataloader, description: str, *args, **kwargs):
        """As the parent's; where it casts the model, the weights are put back.

        Raises:
            FNSFTError: no batch of an evaluation holds a label.
        """
        self._evaluated_on = BatchCount()
        is_cast = not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval)
        with weights_kept(self.model) if is_cast and self.keeps_weights else nullcontext():
            result = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if description == "Evaluation":
            self._check_labels(self._evaluated_on, "evaluation")
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's.

        Raises:
            FNSFTError: what was trained is not finite; or, in a checkpoint, no batch so far held a label.
        """
        check_weights(self.model)
        if _internal_call:
            self._check_labels(self._trained_on, "training", is_done=False)
        super().save_model(output_dir, _internal_call)

    def _check_labels(self, found: BatchCount, what: str, *, is_done: bool = True) -> None:
        batches, empty, broken = found.totals(self)
        if batches and empty == batches:
            raise FNSFTError(
                f"none of the {batches} batches of the {what}{'' if is_done else ' so far'} holds a token with a "
                "label, so there is nothing to learn or to measure; see that rows have text and answers begin within "
                "max_length, and what completion_only_loss and assistant_only_loss leave"
            )
        if is_done and empty:
            logger.warning(
                f"{empty} of the {batches} batches of the {what} hold no token with a label; each counts in the mean "
                "loss with 0.0"
            )
        if broken:
            logger.warning(f"{broken} of the {batches} batches of the {what} give a loss that is not finite")
