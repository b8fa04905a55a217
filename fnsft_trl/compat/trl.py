"""What is needed of TRL beyond its public interface. Seen in TRL 1.16.0."""

from transformers import Trainer

# Loads a model as SFTTrainer does from a name: the class that its config names, where it goes, its precision. The
# networks must be known before SFTTrainer wraps the model, so it is loaded before.
# https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py
from trl.trainer.utils import create_model_from_path


__all__ = ["PREPARATION_SETTINGS", "create_model_from_path", "evaluation_metrics"]

# The arguments of a trainer that decide what `SFTTrainer._prepare_dataset` makes of a dataset, beside those that it is
# handed by name: prepared data are kept under a key of all of them.
# https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py
PREPARATION_SETTINGS = (
    "dataset_text_field",
    "max_length",
    "truncation_mode",
    "packing_strategy",
    "shuffle_dataset",
    "assistant_only_loss",
    "use_liger_kernel",  # of TRL 1.14, which drops columns under it
)


def evaluation_metrics(trainer: Trainer) -> dict[str, list[float]]:
    """What a trainer of TRL has gathered in an evaluation beside the loss; its next log shows the means.

    There they are named `eval_` + name in every evaluation, whatever its `metric_key_prefix`.
    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py
    """
    return vars(trainer).get("_metrics", {}).get("eval", {})
