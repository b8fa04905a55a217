"""What would end a training at its beginning, or leave it without a step, found out before anything is loaded."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from ..compat.transformers import installed_trackers
from ..errors import FNSFTError, library_errors
from .numbers import check_numbers


# What torch takes, the others by name alone, and what TRL has beside it.
_CHECKPOINTING = {"selective", "preserve_rng_state", *inspect.signature(checkpoint).parameters}
_CHECKPOINTING -= {"function", "args", "kwargs"}
# Which read the model, so that they are made when it is there.
_OF_MODEL = ("galore", "apollo", "lomo")


def check_start(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Check what a Trainer finds out when its training begins.

    Args:
        args: the arguments of the trainer.
        given: what it is given beside them, by name, as far as that is known.

    Raises:
        FNSFTError: a number without a meaning, a package that is not installed, an optimizer or a schedule that does
            not take its arguments, not one step to make, or offloading without an accelerator.
    """
    check_numbers(args)
    for name in args.report_to:
        if name not in installed_trackers():
            raise FNSFTError(f"the tracker {name} of report_to is not installed; install it, or drop it")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise FNSFTError("use_liger_kernel needs the package liger-kernel; install it, or drop use_liger_kernel")
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise FNSFTError(
            "dataloader_persistent_workers keeps the workers of dataloader_num_workers, which is 0; give a number, or "
            "drop it"
        )
    unknown = set(args.gradient_checkpointing_kwargs or {}) - _CHECKPOINTING if args.gradient_checkpointing else None
    if unknown:
        raise FNSFTError(
            f"gradient_checkpointing_kwargs has {min(unknown)!r}; it takes {', '.join(sorted(_CHECKPOINTING))}"
        )
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":  # plain arguments have none
        raise FNSFTError("activation_offloading moves activations from an accelerator, and there is none; drop it")
    _check_steps(args, given.get("train_dataset"))
    optimizer, schedule = given.get("optimizers") or (None, None)
    if optimizer is None and given.get("optimizer_cls_and_kwargs") is None:
        _check_optimizer(args)
    if schedule is None:
        _check_schedule(args)


def check_holds_weights(trainer: Trainer) -> None:
    """Refuse an optimizer that was given and holds none of the weights that train, as one made before the adapter was.

    Raises:
        FNSFTError: nothing would train.
    """
    if trainer.optimizer is None:
        return
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    if not any(id(weight) in held for weight in trainer.model.parameters() if weight.requires_grad):
        raise FNSFTError(
            "the optimizer that was given holds none of the weights that train, since the trainer puts the adapter on "
            "the model; give its class (optimizer_cls_and_kwargs) instead of optimizers, or name it in optim"
        )


def _check_steps(args: TrainingArguments, rows: Any) -> None:
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs == 0):
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise FNSFTError(f"{name} is 0, so that nothing would be trained; give a number above 0")
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(rows, Dataset) and 0 < len(rows) < batch:
        raise FNSFTError(
            f"the training data has {len(rows)} rows, a batch has {batch}, and dataloader_drop_last leaves out what "
            "does not fill one, so that nothing would be trained; drop it, or make the batch smaller"
        )


def _check_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer once, of one weight; of those that read the model, see that their package is there."""
    optim = str(getattr(args.optim, "value", args.optim))  # text, where it was set later
    reads_model = any(name in optim for name in _OF_MODEL)
    try:
        with library_errors(lambda error: f"optim={optim} cannot be used: {error}"):
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
            if not reads_model and cls.__module__.startswith("torch.optim"):
                cls([torch.nn.Parameter(torch.zeros(1))], **settings)
    except FNSFTError as error:
        if not reads_model or isinstance(error.__cause__, ImportError):
            raise


def _check_schedule(args: TrainingArguments) -> None:
    """Make the learning rate schedule once; how many steps there will be is not known yet, unless they are given."""
    steps = args.max_steps if args.max_steps > 0 else 10**6
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    name, settings = args.lr_scheduler_type, args.lr_scheduler_kwargs
    try:
        get_scheduler(
            name,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError) as error:
        raise FNSFTError(
            f"lr_scheduler_kwargs is {settings or 'not given'}, which lr_scheduler_type={name.value} does not take: "
            f"{error}"
        ) from error
