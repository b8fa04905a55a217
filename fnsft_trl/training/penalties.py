"""Penalties: what a PenaltyConfig does in one run, of any trainer, with networks and without."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..constraints import zero_frozen_gradients
from .earlier_answers import EarlierAnswers
from .elastic import ElasticWeights
from .orthogonal import OrthogonalFactors
from .penalty_config import PenaltyConfig


class Penalties:
    """
    One run's penalties. Its methods are called in their order.

    Args:
        config ([`PenaltyConfig`]): what is asked for.
        args: of the trainer.

    Attributes:
        elastic ([`ElasticWeights`] or `None`): EWC.
        answers ([`EarlierAnswers`] or `None`): LwF.
        factors ([`OrthogonalFactors`] or `None`): O-LoRA.

    Raises:
        FNSFTError: something cannot be read, or does not go with the arguments.
    """

    def __init__(self, config: PenaltyConfig, args) -> None:
        self.config = config
        joined = {name: bool(getattr(args, name, False)) for name in ("packing", "padding_free")}
        config.check_batches(**joined)
        is_elastic = config.ewc is not None or config.ewc_save
        self.elastic = ElasticWeights(config) if is_elastic else None
        self.answers = EarlierAnswers(config) if config.lwf is not None else None
        self.factors = OrthogonalFactors(config) if config.olora is not None else None
        self._sums: dict[str, list[float]] = {}
        self._has_begun = False

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Have every step of an optimizer followed by what an infinite weight keeps."""
        for each in (self.elastic, self.factors):
            if each is not None:
                each.attach(optimizer, model)

    def begin(self, trainer) -> None:
        """Take the model of a trainer as it is before it is trained or a checkpoint is loaded; once."""
        if self.elastic is not None:
            self.elastic.measured = None
        if self._has_begun:
            return
        self._has_begun = True
        if self.elastic is not None:
            self.elastic.begin(trainer)
        if self.factors is not None:
            self.factors.begin(trainer.model)
        if self.answers is not None:
            self.answers.begin(trainer.model)

    def step(
        self, trainer, model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Add the gradients of all penalties to those of a batch; once for each step where they know no batch.

        Args:
            trainer, model, inputs, positions: see [`EarlierAnswers.step`].

        Returns:
            What they add to the loss, detached.
        """
        added = torch.zeros((), device=trainer.args.device)
        if self.answers is not None:
            loss = self.answers.step(trainer, model, inputs, positions)
            self._note("lwf", float(loss) * trainer.current_gradient_accumulation_steps)
            added = added + loss
        if not trainer.accelerator.sync_gradients:
            return added
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, each in (("ewc", self.elastic), ("olora", self.factors)):
            if each is not None and each.weight:
                penalty = each.add_gradient(trainer.model, scale)
                self._note(name, penalty)
                added = added + penalty
        zero_frozen_gradients(trainer.model)
        return added

    def end(self, trainer) -> None:
        """Measure after the training what the next task needs."""
        if self.config.ewc_save:
            self.elastic.end(trainer)

    def save(self, directory: Path) -> None:
        """Write what the next task needs beside the weights, once it was measured."""
        if self.elastic is not None:
            self.elastic.save(directory)

    def logged(self) -> dict[str, float]:
        """The mean of each penalty, in nats, since it was asked for last."""
        found = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums = {}
        return found

    def settings(self) -> dict[str, Any]:
        """What decides what is trained, as JSON values."""
        config = self.config
        found: dict[str, Any] = {}
        if config.ewc is not None:
            found["ewc"] = {"weight": config.ewc, "rows": config.ewc_rows, "sources": config.ewc_datasets}
            found["ewc"]["from"] = config.ewc_from
        if config.lwf is not None:
            found["lwf"] = {"weight": config.lwf, "temperature": config.lwf_temperature}
        if config.olora is not None:
            found["olora"] = {"weight": config.olora, "adapters": config.olora_adapters}
        return found

    def _note(self, name: str, value: float) -> None:
        self._sums.setdefault(name, []).append(value)
