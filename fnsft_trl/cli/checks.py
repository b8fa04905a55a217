"""Checks that TRL and transformers make when the training begins, or in its first evaluation."""

from pathlib import Path

from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from trl import SFTConfig

from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..training.start import check_start


# What an evaluation of SFTTrainer measures. aux_loss is that of experts.
_EVAL_METRICS = (
    *("loss", "mean_token_accuracy", "entropy", "aux_loss", "num_tokens"),
    *("runtime", "samples_per_second", "steps_per_second"),
)


def check_training_arguments(args: SFTConfig, retention: RetentionConfig | None = None) -> None:
    """Check, before anything is loaded, what would end the training at its beginning.

    Args:
        args: the arguments of the trainer.
        retention: what is measured beside the evaluations.

    Raises:
        FNSFTError: as [`~fnsft_trl.training.start.check_start`], or a metric that is not measured.
    """
    check_start(args, {})
    metric, known = args.metric_for_best_model, (*_EVAL_METRICS, *(retention.metrics() if retention else ()))
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise FNSFTError(
            f"metric_for_best_model is {metric!r}, which no evaluation here measures; it must be one of: "
            f"{', '.join(known)}"
        )


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
