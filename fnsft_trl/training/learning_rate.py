"""What learning rates are high for a way of training, and which are low: the first thing to try against forgetting.

Adam's step has a magnitude of about the learning rate in each entry of a weight, whatever the scale of the gradient
(Kingma & Ba, 2015, "Adam", arXiv 1412.6980, section 2.1: |D_t| <= a, up to a factor near 1). So T steps change a
weight by at most T a. To second order, the divergence from the base grows with the square of the change. Biderman et
al. (2024, "LoRA Learns Less and Forgets Less", arXiv 2405.09673) have measured side by side what full fine-tuning and
LoRA learn and forget.
"""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam's kind for one way of training.

    Attributes:
        high (`float`): above it a run is warned.
        low (`float`): where to begin, if little is to be forgotten.
    """

    high: float
    low: float


# As the measurements in docs/forgetting.md have it: at the high ones forgetting begins to outrun learning.
RATES = {"full": Rates(1e-4, 3e-5), "lora": Rates(3e-4, 1e-4), "neuron_delta": Rates(1e-3, 3e-4)}


def high_rate(method: str, args: TrainingArguments) -> str | None:
    """What there is to say of the learning rate of a run; `None` where it is not high, or its optimizer no Adam.

    Args:
        method: `"full"`, `"lora"` or `"neuron_delta"`.
        args: of the trainer.
    """
    rates, optimizer = RATES[method], OptimizerNames(args.optim).value
    if "adam" not in optimizer or args.learning_rate <= rates.high:
        return None
    return (
        f"learning_rate is {args.learning_rate:g}, which is high for {method}: above {rates.high:g} much of what is "
        f"forgotten buys little on most tasks. Try {rates.low:g} first, with more steps if it learns too slowly "
        "(docs/forgetting.md, What to try first)"
    )


def warn_of_high_rate(trainer: Trainer, method: str | None) -> None:
    """Say where the learning rate is high for what trains; of other PEFT methods none is known to be.

    Args:
        trainer: when it is made.
        method: of its networks; `None` without.
    """
    if method is None and not isinstance(trainer.model, PeftModel):
        method = "full"
    elif method is None:
        method = "lora" if isinstance(trainer.model.active_peft_config, LoraConfig) else None
    told = None if method is None else high_rate(method, trainer.args)
    if told is not None and trainer.is_world_process_zero():
        logger.warning(told)
