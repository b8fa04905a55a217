"""The reference model of a trainer (DPO, KTO, GRPO, RLOO): the model before training, masked as the trained one is.

With an adapter, trainers run the model itself without it, or with a copy of it, so the forward mask is on in both. In
full fine-tuning the reference is a second model, which most of them load from a name.
"""

import copy

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..errors import FNSFTError
from ..interventions.masking import MaskHandle, forward_mask
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model
from .engines import Engine


logger = logging.get_logger(__name__)


def check_maskable(args: TrainingArguments) -> None:
    """Refuse a forward mask where a trainer runs the model in a way that the mask does not reach.

    Args:
        args: of the trainer.

    Raises:
        FNSFTError: it generates with vLLM, or computes the reference before the mask is on.
    """
    for name, reason in (
        ("use_vllm", "generates answers with vLLM, which runs a copy of the model that the mask is not on"),
        ("precompute_ref_log_probs", "computes the reference before training, without the mask"),
    ):
        if getattr(args, name, False):
            raise FNSFTError(f"{name} {reason}: the two would not go together; drop {name}, or mask_mode")


def copy_for_reference(model: nn.Module, args: TrainingArguments) -> nn.Module | None:
    """A copy of the model for a trainer that takes a reference, in full fine-tuning; `None` where it needs none.

    Without one, a trainer loads it from the model's name, where other weights may lie.

    Args:
        model: before training.
        args: of the trainer.
    """
    return None if getattr(args, "precompute_ref_log_probs", False) else copy.deepcopy(model)


def reference_of(trainer: Trainer) -> nn.Module | None:
    """The model that a trainer has beside the one that it trains, to compare with."""
    found = vars(trainer).get("ref_model")
    return None if found is None else trainer.accelerator.unwrap_model(found)


@torch.no_grad()
def match_reference(trainer: Trainer) -> None:
    """Give a reference that a trainer has loaded from a name the weights of the model that is to be trained.

    Raises:
        FNSFTError: it is another kind of model.
    """
    reference = reference_of(trainer)
    if reference is None:
        return
    if Engine.of_trainer(trainer) is not None:
        logger.warning(
            f"the reference model is as {type(trainer).__name__} loaded it from "
            f"{trainer.model.config.name_or_path!r}; sharded, it is not compared with the model that is trained"
        )
        return
    own, loaded = base_model(trainer.model).state_dict(), reference.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in loaded.items()}:
        raise FNSFTError(
            f"the reference that {type(trainer).__name__} has loaded from {trainer.model.config.name_or_path!r} is "
            "another model than the one to be trained; save the model, and give it by the name of its directory"
        )
    for name, value in loaded.items():
        value.copy_(own[name])


def mask_trainer(trainer, mode: str, mask: NeuronMask, *, factor: float | None = None) -> MaskHandle:
    """Put a forward mask on the model of a trainer, and on the reference that it has made of it.

    Args:
        trainer ([`NetworkedTrainer`]): with its model as it is trained.
        mode: `"lesion"`, `"preserve"` or `"amplify"`.
        mask: the neurons.
        factor: of `"amplify"`.

    Raises:
        FNSFTError: the mask is of another model.
    """
    handle = forward_mask(trainer.model, mode, mask, factor=factor)
    reference = reference_of(trainer)
    if reference is not None and trainer.masks_reference:
        handle.extend(reference)
    return handle
