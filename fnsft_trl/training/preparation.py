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
from ..config import MEASURED_SELECTORS, FunctionalNetworkConfig
from ..data.prompts import set_chat_template
from ..data.sources import load_texts
from ..discovery.discovery import discover_networks
from ..errors import FNSFTError
from ..ranks import Ranks
from ..selection.evidence import SelectorEvidence
from ..template.template import FunctionalNetworkTemplate


logger = logging.get_logger(__name__)

OWN_TEXT = "the training data"  # as a template names the source of a discovery on the rows of its run


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
        FNSFTError: there is no text, or the model does not fit on one device.
    """
    config.check_named_networks()
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
        datasets = {OWN_TEXT: map(text_of, texts)}
    _place(model, args)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return discover_networks(model, tokenizer, datasets, config)


def check_whole(config: FunctionalNetworkConfig, *, has_template: bool) -> None:
    """Refuse, before anything is loaded, to read a model whose weights will not be whole in each process.

    Args:
        config: what is asked for.
        has_template: whether the networks are given.

    Raises:
        FNSFTError: networks are to be discovered, or a selector is measured on texts, on weights that are sharded.
    """
    if not has_template:
        what, remedy = "networks cannot be discovered", "run fnsft discover first, and give ica_template_path"
    elif config.ica_select in MEASURED_SELECTORS:
        what, remedy = f"ica_select={config.ica_select} cannot be measured", "take another selector"
    else:
        return
    if is_deepspeed_zero3_enabled():
        raise FNSFTError(f"{what} on weights that ZeRO-3 has sharded; {remedy}")
    if is_fsdp_enabled():
        raise FNSFTError(
            f"{what} with cpu_ram_efficient_loading, which gives the weights to one process only; {remedy}"
        )


def _place(model, args) -> None:
    """Put a model where the Trainer will: reading is slow elsewhere. With `None` the Trainer places it, but later.

    Raises:
        FNSFTError: it does not fit there, as one that is sharded later need not; in all processes, if so in any.
    """
    if args.place_model_on_device is False or hasattr(model, "hf_device_map"):
        return
    ranks = Ranks()
    with ranks.together():
        try:
            model.to(args.device)
        except torch.OutOfMemoryError as error:
            raise FNSFTError(
                f"the model does not fit on {args.device}, and its activations are read before it is sharded; find "
                "the networks in one process (fnsft discover --device_map auto), and give ica_template_path"
            ) from error
    ranks.meet()


def check_selector(config: FunctionalNetworkConfig, *, has_template: bool) -> None:
    """Refuse a selector that will have nothing to compare with, before anything is loaded.

    Args:
        config: with `ica_select`.
        has_template: whether the networks are given.

    Raises:
        FNSFTError: it lacks a general text.
    """
    if config.ica_select == "contrast" and not has_template and not config.ica_datasets:
        raise FNSFTError(
            "ica_select=contrast compares the training data with the text of the networks, which would be the "
            "training data too; give general text as ica_datasets, or a template that was discovered on such text"
        )


def selector_evidence(
    config: FunctionalNetworkConfig,
    template: FunctionalNetworkTemplate,
    model,
    processing_class,
    args,
    train_dataset,
    text_of: Callable[[Any], Any],
) -> SelectorEvidence:
    """What a selector is measured on: the training data, and `ica_datasets`.

    Args:
        template: the networks.
        config, model, processing_class, args, train_dataset, text_of: as for [`discover_template`].

    Raises:
        FNSFTError: there is no training data, or the text of the networks is not named.
    """
    is_own = template.calibration["sources"] == [OWN_TEXT]
    if config.ica_select == "contrast" and is_own:
        check_selector(config, has_template=False)
    if config.ica_select == "surrogate" and not config.ica_datasets and not is_own:
        raise FNSFTError(
            "ica_select=surrogate finds the networks of the template's text anew, shifted in time; name that text as "
            f"ica_datasets ({', '.join(template.calibration['sources']) or 'the template does not say which it was'})"
        )
    if train_dataset is None or (isinstance(train_dataset, Dataset) and len(train_dataset) == 0):
        raise FNSFTError(
            f"there is no training data that ica_select={config.ica_select} could read; give a train_dataset"
        )
    _place(model, args)
    own = {OWN_TEXT: map(text_of, train_dataset)}
    general = load_texts(config.ica_datasets) if config.ica_datasets else own
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return SelectorEvidence(model, tokenizer, task=map(text_of, train_dataset), general=general)
