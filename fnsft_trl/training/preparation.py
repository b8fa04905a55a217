"""What a run needs before PEFT wraps its model: the base model, its tokenizer, and the template."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoProcessor
from transformers.utils import logging

from ..compat.bitsandbytes import is_packed, keep_unpacked, packs_weights
from ..compat.transformers import is_deepspeed_zero3_enabled, is_fsdp_enabled
from ..compat.trl import create_model_from_path
from ..config import FunctionalNetworkConfig
from ..data.prompts import set_chat_template
from ..data.sources import load_texts
from ..discovery.discovery import discover_networks
from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate


logger = logging.get_logger(__name__)


def load_base_model(
    name: str, args, model_init_kwargs: dict | None, quantization_config, *, scores: bool = False, frozen: bool = False
):
    """Load a model as the trainers of TRL do; a frozen one, of which no precision is asked for, in that of the
    arithmetic on an accelerator.

    Args:
        name: of the model.
        args: of the trainer.
        model_init_kwargs: as in its arguments.
        quantization_config: as it is given to the trainer.
        scores: whether it is a reward model, which gives one score for a text.
        frozen: whether none of its own weights is to train.
    """
    options = dict(model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        options["device_map"] = None
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    if frozen and args.bf16 and args.device.type not in ("cpu", "mps"):
        options.setdefault("dtype", torch.bfloat16)
    if scores:
        return create_model_from_path(name, AutoModelForSequenceClassification, num_labels=1, **options)
    return create_model_from_path(name, **options)


def load_processing_class(name: str, args, model_init_kwargs: dict | None, *, generates: bool = False):
    """Load the tokenizer or processor of a model as the trainers of TRL do.

    Args:
        name: of the model.
        args: of the trainer.
        model_init_kwargs: as in its arguments.
        generates: whether the trainer generates answers (GRPO, RLOO), which are to follow right on their prompts.
    """
    return AutoProcessor.from_pretrained(
        name,
        revision=(model_init_kwargs or {}).get("revision"),
        trust_remote_code=getattr(args, "trust_remote_code", False),
        **({"truncation_side": "left", "padding_side": "left"} if generates else {}),
    )


def keep_4bit_layers_differentiable(model) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU.

    It does so in the first forward pass of a discovery or an evaluation and does not undo it in training, where no
    gradient passes through a packed layer.
    """
    for name, module in model.named_modules():
        if not packs_weights(module):
            continue
        if is_packed(module):
            raise FNSFTError(
                f"the 4-bit weights of {name} are packed for inference on a CPU, and no gradient would pass through "
                "them; load the model anew, and train it before any inference"
            )
        keep_unpacked(module)


def discover_template(
    config: FunctionalNetworkConfig, model, processing_class, args, train_dataset, text_of: Callable[[Any], Any]
) -> FunctionalNetworkTemplate:
    """Discover the networks on `ica_datasets` or on the training data.

    Args:
        config: how.
        model: the model.
        processing_class: its tokenizer or processor.
        args: of the trainer.
        train_dataset: the training data.
        text_of: gives the text that is read of one of their rows.

    Raises:
        FNSFTError: there is no text, or the model is sharded.
    """
    config.check_named_networks()
    if is_deepspeed_zero3_enabled():
        raise FNSFTError(
            "networks cannot be discovered on weights that ZeRO-3 has sharded; run fnsft discover first, and give "
            "ica_template_path"
        )
    if is_fsdp_enabled():
        raise FNSFTError(
            "networks cannot be discovered with cpu_ram_efficient_loading, which gives the weights to one process "
            "only; run fnsft discover first, and give ica_template_path"
        )
    if config.ica_datasets:
        datasets = load_texts(config.ica_datasets)
        if processing_class.chat_template is None:
            processing_class = copy.deepcopy(processing_class)
            set_chat_template(processing_class)
    else:
        texts = train_dataset
        if texts is None or (isinstance(texts, Dataset) and len(texts) == 0):
            raise FNSFTError(
                "there is no training data to discover networks on; give a train_dataset with rows, ica_datasets, or "
                "a template"
            )
        first = next(iter(texts), None)
        if isinstance(first, Mapping) and first.keys() & {"image", "images"}:
            raise FNSFTError(
                "the rows of the training data hold images, and networks are discovered on text; give ica_datasets, "
                "or a template (ica_template_path)"
            )
        datasets = {"the training data": map(text_of, texts)}
    # Discovery is slow on another device than the trainer's; with `None` the Trainer places the model, but later.
    if args.place_model_on_device is not False and not hasattr(model, "hf_device_map"):
        model.to(args.device)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return discover_networks(model, tokenizer, datasets, config)
