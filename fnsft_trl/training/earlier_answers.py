"""EarlierAnswers: learning without forgetting, by what the model before a training answers to the rows of the task.

Li & Hoiem (2016), "Learning without Forgetting", arXiv 1606.09282, equations 1 to 4. With y of the model before the
training and z of the model in training, distributions over the vocabulary at each learnt position of a batch, and a
temperature T,

    L = L_task + w L_old,    L_old = - mean over positions of sum over v of y'(v) log z'(v),
    y'(v) = y(v)^(1/T) / sum over u of y(u)^(1/T),    z' alike.

Its gradient with respect to a logit of v is (z'(v) - y'(v)) / (T positions), and its least value the entropy of y'.
The mean is over all positions of a step, however they are dealt to batches and processes, where that of the task is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import FNSFTError
from ..interventions.masking import masks_off
from .elastic import trained_parameters
from .penalty_config import PenaltyConfig


_IGNORED = -100  # the label of a token that is not learnt
_OF_MODEL = ("input_ids", "attention_mask", "position_ids")  # what a language model reads of a batch


class EarlierAnswers:
    """The weights before a training, by which its batches are answered once more.

    Args:
        config ([`PenaltyConfig`]): what is asked for.

    Attributes:
        before (`dict[str, torch.Tensor]`): name of a parameter that trains -> its values before the training.
    """

    def __init__(self, config: PenaltyConfig) -> None:
        self.weight, self.temperature = config.lwf, config.lwf_temperature
        self.before: dict[str, torch.Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        """Keep the weights of a model that is to be trained."""
        self.before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}

    def step(
        self, trainer, model: nn.Module, inputs: Mapping[str, Any], positions: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Add the gradient of w L_old on a batch of the task to that of the task.

        Args:
            trainer: in its training.
            model: as it trains it.
            inputs: the batch.
            positions: how many are learnt in the whole step, by which the task is averaged; `None` where it takes the
                mean of its batches.

        Returns:
            What it adds to the loss of the step, detached.

        Raises:
            FNSFTError: the batch holds no tokens with labels, or something beside them.
        """
        if "labels" not in inputs or "input_ids" not in inputs:
            raise FNSFTError(f"lwf needs batches of tokens with labels, and one holds {', '.join(inputs)}; drop lwf")
        if others := [name for name in inputs if name not in (*_OF_MODEL, "labels")]:
            raise FNSFTError(
                "lwf lets the model before the training answer rows of tokens alone, and a batch holds "
                f"{others[0]} too; drop lwf"
            )
        inputs = {name: value.to(trainer.args.device) for name, value in inputs.items() if torch.is_tensor(value)}
        read = {name: inputs[name] for name in _OF_MODEL if name in inputs}
        learnt = inputs["labels"][:, 1:] != _IGNORED  # (rows, tokens - 1)
        plain = trainer.accelerator.unwrap_model(model)
        # What is kept is the model as it is used, without forward masks, nor where a checkpoint computes it again.
        with masks_off(plain):
            with trainer.compute_loss_context_manager():
                before = self._answered(plain, read)[:, :-1][learnt]
                now = model(**read).logits[:, :-1][learnt]  # (learnt positions, vocabulary)
                share = _share(trainer, len(now), positions)
                loss = self.weight * share * distillation(before, now, self.temperature)
            trainer.accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def _answered(self, plain: nn.Module, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits of the model before the training."""
        was_training = plain.training
        plain.eval()
        try:
            with _values(trained_parameters(plain), self.before):
                return plain(**read).logits
        finally:
            plain.train(was_training)


def _share(trainer, own: int, positions: torch.Tensor | int | None) -> float:
    """By how much the mean over a batch counts in the gradient of its process, of which processes take the mean."""
    if positions is None:
        return 1 / trainer.current_gradient_accumulation_steps
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return own * processes / max(1, int(positions))


def distillation(before: torch.Tensor, now: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_old: the cross-entropy of two sets of logits at a temperature.

    Args:
        before: logits of the model before the training, shape (positions, vocabulary).
        now: those of the model in training.
        temperature: T.
    """
    answered = (before.float() / temperature).softmax(-1)
    logs = (now.float() / temperature).log_softmax(-1)
    costs = (answered * logs).masked_fill(answered == 0, 0)  # of a token that both rule out, 0 x -inf
    return -costs.sum(-1).mean() if len(now) else logs.sum()


@contextmanager
def _values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Parameters with other values for as long as this is open."""
    now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(now[name])
