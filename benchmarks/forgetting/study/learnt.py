"""What a training has changed, scaled: the points between base and trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from fnsft_trl.experiments.arms import lost
from fnsft_trl.experiments.held_out import HeldOut
from fnsft_trl.training.retention import retention_of


class Start(TrainerCallback):
    """Notes what trains as it was before training.

    Args:
        trainer: whose model it is.

    Attributes:
        weights (`dict[str, torch.Tensor]`): name of a parameter that trains -> its value.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trained = ((name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad)
        self.weights = {name: parameter.detach().clone() for name, parameter in trained}


def start_of(trainer: Trainer) -> Start:
    """That of a trainer."""
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Start))


@contextmanager
def scaled(model: nn.Module, start: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """A model whose change is a part of what it is: base + scale (trained - base), or scale B A of a LoRA.

    Args:
        model: trained.
        start: name of a parameter -> its value before training.
        scale: 0 gives the base.
    """
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in start or (isinstance(model, PeftModel) and "lora_A" in name):
                    continue
                base = torch.zeros_like(parameter) if isinstance(model, PeftModel) else start[name]
                parameter.copy_(base + scale * (parameter - base))
        yield
    finally:
        put_back(model, trained)


def put_back(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give parameters the values that were noted."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def point(trainer: Trainer, held_out: HeldOut) -> dict[str, Any]:
    """What a model has learnt and lost as it is now: an entry as those of a cell's `points`."""
    rows = held_out.score(trainer.model, batch_size=trainer.args.per_device_eval_batch_size)
    series = {each.name: each for each in retention_of(trainer).series}
    for each in series.values():
        each.measure(trainer.model)
    summary = held_out.summary(rows)
    return {"learning": summary["nll"], **summary, **lost(series)}


def interpolated(trainer: Trainer, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Points between base and trained.

    Args:
        trainer: trained, with a [`Start`].
        scales: each in (0, 1).
    """
    held_out = HeldOut.of(trainer.eval_dataset, trainer.processing_class)
    found = []
    for scale in scales:
        with scaled(trainer.model, start_of(trainer).weights, scale):
            found.append({"scale": scale, **point(trainer, held_out)})
    return found
