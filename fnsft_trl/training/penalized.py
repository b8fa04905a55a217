"""PenalizedTrainer: a Trainer whose loss holds penalties that keep what was learnt before."""

from pathlib import Path

import torch

from ..constraints import plain_optimizer
from .anchored import AnchoredTrainer
from .penalties import Penalties


class PenalizedTrainer(AnchoredTrainer):
    """Trainer with EWC, LwF and O-LoRA beside its own loss, whatever that is.

    Args:
        penalties ([`Penalties`], *optional*): what is asked for.
        args, kwargs: those of the trainer that it goes in front of.
    """

    def __init__(self, *args, penalties: Penalties | None = None, **kwargs) -> None:
        self.penalties: Penalties | None = None  # until the model is there
        super().__init__(*args, **kwargs)
        self.penalties = penalties

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; what an infinite weight keeps is put back after each step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.penalties is not None:
            self.penalties.attach(plain_optimizer(optimizer), self.model)
        return optimizer

    def train(self, *args, **kwargs):
        """As the parent's; the model is what it was before, until it is trained or a checkpoint is loaded."""
        if self.penalties is None:
            return super().train(*args, **kwargs)
        self.penalties.begin(self)
        result = super().train(*args, **kwargs)
        self.penalties.end(self)
        return result

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As the parent's; the penalties are added to the loss and its gradient."""
        kept = dict(inputs) if self.penalties is not None else None
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss if kept is None else loss + self.penalties.step(self, model, kept, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; after a training, with what the next task needs of it."""
        super().save_model(output_dir, _internal_call)
        if self.penalties is not None and self.args.should_save:
            self.penalties.save(Path(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As the parent's; with the mean of each penalty since the last entry, over all processes."""
        found = self.penalties.logged() if "loss" in logs and self.penalties is not None else {}
        if found:
            means = torch.tensor(list(found.values()), device=self.args.device)
            means = self.accelerator.reduce(means, "mean").tolist()
            logs = {**logs, **dict(zip(found, means, strict=True))}
        super().log(logs, *args, **kwargs)
