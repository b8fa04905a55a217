"""DivergenceGuard: ends a run whose loss or gradients are no longer finite, before they reach the weights."""

from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..compat.deepspeed import is_partitioned, own_part
from ..errors import FNSFTError


# Steps in a row that float16's gradient scaler may skip. It starts at a scale of 2 ** 16 and halves it for each.
_MOST_SKIPPED = 32


class TrainingDiverged(FNSFTError):
    """The loss, the gradients or the weights of a run are not finite."""


class DivergenceGuard(TrainerCallback):
    """Ends a run whose loss or gradients are not finite, before a step of the optimizer writes them into the weights.

    Under float16 a step whose gradients are not finite is skipped, and halves the scale of the loss: that is how a
    scale is found. There a run ends when no step was made for long, or none at all.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer. It hands over every loss (`see_loss`) and its optimizer (`watch`).

    Raises:
        TrainingDiverged: naming the step, what is not finite, and the learning rate.
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._optimizer: Optimizer | None = None
        self._begin()

    def _begin(self) -> None:
        self._loss: float | None = None  # of this step, if it is not finite
        self._made, self._skipped = 0, 0  # steps; those skipped since the last one made
        scaler = self.trainer.accelerator.scaler  # of float16
        self._scale = None if scaler is None else scaler.get_scale()

    def see_loss(self, loss: torch.Tensor) -> None:
        """Note a loss that is not finite; the next step of the optimizer will not be made."""
        if not torch.isfinite(loss).all():
            self._loss = loss.float().mean().item()

    def watch(self, optimizer: Optimizer) -> None:
        """Look at the gradients before every step of an optimizer; once, however often this is called."""
        if optimizer is not self._optimizer and isinstance(optimizer, Optimizer):
            optimizer.register_step_pre_hook(self._before_step)
            self._optimizer = optimizer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._begin()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._scale is None and self._loss is not None:  # of an optimizer without hooks
            self._fail(state.global_step, f"the loss is {self._loss}")
        self._loss = None
        scale = None if self._scale is None else self.trainer.accelerator.scaler.get_scale()
        if scale is not None and scale < self._scale:
            self._skipped += 1
        else:
            self._made, self._skipped = self._made + 1, 0
        self._scale = scale
        if self._skipped >= _MOST_SKIPPED:
            self._fail(state.global_step, f"the gradients of the last {self._skipped} steps are not finite")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._skipped and not self._made:
            self._fail(state.global_step, f"the gradients of all {self._skipped} steps are not finite")

    def _before_step(self, optimizer: Optimizer, *_) -> None:
        if self._scale is not None:
            return
        step = self.trainer.state.global_step + 1
        if self._loss is not None:
            self._fail(step, f"the loss is {self._loss}")
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all_finite(p.grad for p in parameters):
            names = {id(p): name for name, p in self.trainer.model.named_parameters()}
            name = next(names.get(id(p), "a weight") for p in parameters if not all_finite([p.grad]))
            self._fail(step, f"the gradient of {name} is not finite")

    def _fail(self, step: int, what: str) -> None:
        rate = max((group["lr"] for group in self._optimizer.param_groups), default=0) if self._optimizer else None
        at = f"at a learning rate of {float(rate):g}" if rate is not None else "at this learning rate"
        logged = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        before = f", {logged[-1]['loss']:.4g} logged at step {logged[-1]['step']}" if logged else ""
        raise TrainingDiverged(
            f"the training diverged in step {step}: {what}, {at}{before}. Nothing of this step is saved, checkpoints "
            "written before are as they were; lower learning_rate, add warmup_steps, or look for bad rows"
        )


def check_weights(model: nn.Module) -> None:
    """Check, before a model is saved, that what was trained is finite.

    Args:
        model: the model; where it is sharded, all processes must make the call.

    Raises:
        TrainingDiverged: naming the first weight that is not; in all processes, if it is so in any.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    name = None
    if not all_finite(trained.values()):
        name = next(name for name, p in trained.items() if not all_finite([p]))
    if any(isinstance(p, DTensor) or is_partitioned(p) for p in trained.values()):
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, name)
        name = next(filter(None, found), None)
    if name is not None:
        raise TrainingDiverged(
            f"the training diverged: {name} is not finite, so the model is not saved; train again from an earlier "
            "checkpoint, at a lower learning_rate"
        )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all entries of tensors are finite; of sharded ones, those in this process."""
    values = [_own(tensor).detach() for tensor in tensors]
    # One number for all of them is read at the speed of memory, and an accelerator is waited for once. It overflows
    # before they do.
    norm = torch.nn.utils.get_total_norm(values)
    return bool(norm.isfinite()) or all(bool(value.isfinite().all()) for value in values)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return own_part(tensor) if is_partitioned(tensor) else tensor
