"""Checks that TRL and transformers make when the training begins, or in its first evaluation."""

from pathlib import Path

import torch
from transformers import get_scheduler
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    is_liger_kernel_available,
)
from trl import SFTConfig

from ..compat.transformers import installed_trackers
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig


# What an evaluation of SFTTrainer measures. aux_loss is that of experts.
_EVAL_METRICS = (
    *("loss", "mean_token_accuracy", "entropy", "aux_loss", "num_tokens"),
    *("runtime", "samples_per_second", "steps_per_second"),
)


def check_training_arguments(args: SFTConfig, device: str, retention: RetentionConfig | None = None) -> None:
    """Check, before anything is loaded, what would end the training at its beginning.

    Args:
        args: the arguments of the trainer.
        device: type of the device that it computes on.
        retention: what is measured beside the evaluations.

    Raises:
        FNSFTError: a tracker or a kernel that is not installed, a schedule that does not take its arguments, a metric
            that is not measured, or offloading without an accelerator.
    """
    for name in args.report_to:
        if name not in installed_trackers():
            raise FNSFTError(f"the tracker {name} of report_to is not installed; install it, or drop it")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise FNSFTError("use_liger_kernel needs the package liger-kernel; install it, or drop use_liger_kernel")
    if args.activation_offloading and device == "cpu":
        raise FNSFTError("activation_offloading moves activations from an accelerator, and there is none; drop it")
    _check_schedule(args)
    metric, known = args.metric_for_best_model, (*_EVAL_METRICS, *(retention.metrics() if retention else ()))
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise FNSFTError(
            f"metric_for_best_model is {metric!r}, which no evaluation here measures; it must be one of: "
            f"{', '.join(known)}"
        )


def _check_schedule(args: SFTConfig) -> None:
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


def check_checkpoint(directory: Path, *, adapter: bool) -> None:
    """Check that a training can go on from a checkpoint.

    Args:
        directory: of the checkpoint.
        adapter: whether this run trains an adapter.

    Raises:
        FNSFTError: it is one of an adapter where the model trains, or the other way round.
    """
    of_adapter = (directory / ADAPTER_CONFIG_NAME).is_file()
    of_model = any((directory / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if of_adapter and not adapter:
        raise FNSFTError(f"{directory} is a checkpoint of an adapter, and this run trains none; add its options again")
    if of_model and not of_adapter and adapter:
        raise FNSFTError(
            f"{directory} is a checkpoint of a whole model, and this run trains an adapter; drop its options"
        )
