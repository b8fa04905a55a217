"""with_networks: any trainer, with functional networks."""

from functools import cache

from transformers import Trainer
from trl import SFTTrainer

from ..errors import FNSFTError
from .networked import NetworkedTrainer
from .trainer import FNSFTTrainer


@cache
def with_networks(trainer_class: type[Trainer]) -> type[NetworkedTrainer]:
    """A class of trainers, with functional networks.

    What it returns takes the arguments of the class, and `network_config` and `network_template` as [`FNSFTTrainer`]
    does. It discovers or loads the networks before the trainer is made. So this comes before PEFT wraps the model, and
    before a reference model is made, which is the model before training. Without a `network_config` it is the trainer
    itself.

    Example:

    ```python
    >>> import torch
    >>> from datasets import load_dataset
    >>> from fnsft_trl import FunctionalNetworkConfig, with_networks
    >>> from trl import DPOConfig, DPOTrainer

    >>> trainer = with_networks(DPOTrainer)(
    ...     model="meta-llama/Llama-3.2-1B-Instruct",
    ...     args=DPOConfig(output_dir="output", bf16=torch.accelerator.is_available()),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ...     network_config=FunctionalNetworkConfig(ica_component_ids=[0, 3]),
    ... )
    >>> trainer.train()
    ```

    Args:
        trainer_class (`type`):
            [`~transformers.Trainer`] or a subclass of it: TRL's DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer,
            RLOOTrainer, or one of your own. For [`~trl.SFTTrainer`] it is [`FNSFTTrainer`].

    Returns:
        A subclass of it, the same one for each call, with the attributes of [`FNSFTTrainer`].

    Raises:
        FNSFTError: it is no class of trainers.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise FNSFTError(
            f"with_networks is given {trainer_class!r}; it takes a class, transformers.Trainer or a subclass of it, "
            "and what it returns makes the trainer: with_networks(DPOTrainer)(model=..., network_config=...)"
        )
    if issubclass(trainer_class, NetworkedTrainer):
        return trainer_class
    if trainer_class is SFTTrainer:
        return FNSFTTrainer
    own = {"_trainer_class": trainer_class, "__module__": __name__, "__doc__": NetworkedTrainer.__doc__}
    return type(f"FN{trainer_class.__name__}", (NetworkedTrainer, trainer_class), own)
