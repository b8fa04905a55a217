"""AnchoredTrainer: a Trainer that keeps its model near its base on general text."""

import torch

from .anchor import KLToBase
from .watched import WatchedTrainer


class AnchoredTrainer(WatchedTrainer):
    """Trainer with a KL divergence to the base beside its own loss, whatever that is.

    Each batch of the training is followed by one of general text, with a backward pass of its own. So the memory
    needed is that of the larger of the two. The loss that is logged is their sum, `kl_to_base` the divergence.

    Args:
        anchor ([`KLToBase`], *optional*): the texts and the weight.
        args, kwargs: those of the trainer that it goes in front of.
    """

    def __init__(self, *args, anchor: KLToBase | None = None, **kwargs) -> None:
        self.anchor: KLToBase | None = None  # until the model is there
        super().__init__(*args, **kwargs)
        self.anchor = anchor
        self._divergences: list[float] = []
        if anchor is not None:
            anchor.prepare(self)

    def train(self, *args, **kwargs):
        """As the parent's; the model becomes the base before it is trained or a checkpoint is loaded."""
        if self.anchor is not None:
            self.anchor.begin(self)
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """As the parent's; the divergence of a batch of general text is added to the loss and its gradient."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.anchor is not None:
            loss = loss + self.anchor.step(self, model)
            self._divergences.append(self.anchor.last)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As the parent's; with the mean divergence since the last entry."""
        if "loss" in logs and self.anchor is not None and self._divergences:
            mean = torch.tensor(sum(self._divergences) / len(self._divergences), device=self.args.device)
            logs = {**logs, "kl_to_base": float(self.accelerator.reduce(mean, "mean"))}
            self._divergences = []
        super().log(logs, *args, **kwargs)
