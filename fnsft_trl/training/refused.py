"""What SFTTrainer refuses of its arguments, found out before a model is loaded, with a way out."""

import inspect
import os
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from trl import SFTConfig, is_conversational, is_conversational_from_value

from ..data.rendering import answers_template
from ..errors import FNSFTError
from .given_rows import check_cells, check_held_out, check_ids, check_rows, datasets_of, first_row


_SAMPLED = 1000  # rows
_LOSSES = ("nll", "dft", "chunked_nll")  # the last one is the default of TRL 1.14, and the first one's alias since


def check_refused(given: Mapping[str, Any], args: TrainingArguments) -> None:
    """Check what SFTTrainer would refuse only after it has loaded a model, or networks were discovered on it.

    Args:
        given: the arguments of the trainer by name, `processing_class` with them.
        args: the training arguments.

    Raises:
        FNSFTError: one of them, with what to do instead.
    """
    if not isinstance(args, SFTConfig):  # as SFTTrainer makes one of others
        args = SFTConfig(**args.to_dict() | {"hub_token": args.hub_token})
    sample = _sample(given.get("train_dataset"), args)
    check_held_out(given.get("eval_dataset"))
    _check_settings(args, given)
    _check_tokens(args, given["processing_class"])
    is_vision = bool(sample.keys() & {"image", "images"})
    if is_vision:
        _check_images(args, given["processing_class"], sample)
    _check_lengths(args, given, is_vision)
    prepares = not (args.dataset_kwargs or {}).get("skip_prepare_dataset") and not is_vision
    if prepares and given.get("formatting_func") is None:
        for name, dataset in datasets_of(given):
            check_cells(dataset, name, args.dataset_text_field)
            _check_columns(args, sample if name == "train_dataset" else next(iter(dataset)), name)
    if not prepares and not is_vision and given.get("data_collator") is None and "input_ids" not in sample:
        raise FNSFTError(
            "dataset_kwargs has skip_prepare_dataset, and the rows have no 'input_ids'; drop it, or tokenise the rows"
        )
    _check_loss(args, given, sample)
    for name, dataset in datasets_of(given):
        check_rows(dataset, name, prepares, is_vision)
    _check_evaluation(args, given)
    _check_model(args, given)


def _sample(dataset, args: SFTConfig) -> dict:
    """The first row, or the first of some in which no conversation is empty."""
    first = first_row(dataset, "train_dataset")
    sample = next((row for row in islice(dataset, _SAMPLED) if not any(map(_is_empty, row.values()))), None)
    if sample is None:
        column = next(name for name, value in first.items() if _is_empty(value))
        raise FNSFTError(f"train_dataset has no {column!r} in its first rows; to_trl_format leaves such rows out")
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise FNSFTError("train_dataset is a stream, whose length is not known; set max_steps")
    return sample


def _is_empty(value: Any) -> bool:
    return isinstance(value, list) and not value  # of another format of rows it is an array, and no conversation


def _check_settings(args: SFTConfig, given: Mapping[str, Any]) -> None:
    if args.loss_type not in _LOSSES:
        raise FNSFTError(f"loss_type is {args.loss_type!r}; expected one of: {', '.join(_LOSSES)}")
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise FNSFTError(f"truncation_mode is {args.truncation_mode!r}; expected keep_start or keep_end")
    if args.loss_type == "dft" and given.get("compute_loss_func") is not None:
        raise FNSFTError("loss_type=dft has a loss of its own, beside compute_loss_func; drop one of them")
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise FNSFTError("liger_kernel_config asks for fused_linear_cross_entropy, which SFTTrainer replaces; drop it")
    if unknown := set(args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise FNSFTError(f"dataset_kwargs has {min(unknown)!r}; SFTTrainer reads skip_prepare_dataset alone, drop it")
    checkpointing = args.gradient_checkpointing_kwargs or {}
    if checkpointing.get("selective") and (not args.gradient_checkpointing or checkpointing.get("use_reentrant")):
        raise FNSFTError(
            "gradient_checkpointing_kwargs has selective, which needs gradient_checkpointing: true and no "
            "use_reentrant; set these, or drop selective"
        )
    if given.get("optimizer_cls_and_kwargs") is not None and (given.get("optimizers") or (None,))[0] is not None:
        raise FNSFTError("optimizers and optimizer_cls_and_kwargs both give an optimizer; drop one of them")
    parallel = {
        kind: max(getattr(args.parallelism_config, f"{kind}_size", 1) or 1, _environment(kind))
        for kind in ("cp", "sp")
    }
    if parallel["cp"] > 1 and (args.packing or args.eval_packing):
        raise FNSFTError("context parallelism does not keep packed rows apart; set packing and eval_packing to false")
    has_own_loss = args.loss_type == "dft" or given.get("compute_loss_func") or args.label_smoothing_factor > 0
    if parallel["sp"] > 1 and has_own_loss:
        raise FNSFTError(
            "sequence parallelism has the model's own loss; drop loss_type, compute_loss_func and "
            "label_smoothing_factor"
        )


def _environment(kind: str) -> int:
    """The size of a kind of parallelism that accelerate's file sets."""
    return int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE") or 1)


def _check_tokens(args: SFTConfig, processing_class) -> None:
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        raise FNSFTError(
            f"processing_class is a {type(processing_class).__name__}; expected the model's tokenizer or processor"
        )
    vocabulary = _core(processing_class).get_vocab()
    for name in ("eos_token", "pad_token"):
        if (token := getattr(args, name)) is not None and token not in vocabulary:
            raise FNSFTError(f"{name} is {token!r}, which is no token of the tokenizer; name one that is, or drop it")
    if args.assistant_only_loss:
        answers_template(processing_class)


def _core(processing_class) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def _check_images(args: SFTConfig, processing_class, sample: Mapping) -> None:
    if not isinstance(processing_class, ProcessorMixin):
        column = next(name for name in ("image", "images") if name in sample)
        raise FNSFTError(
            f"the rows have the column {column!r}, and processing_class is a {type(processing_class).__name__}, which "
            "reads text alone; take the processor of a vision-language model, or drop the column"
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name):
            raise FNSFTError(f"{name} does not go with images; set {name} to false")
    if args.max_length is not None and args.truncation_mode == "keep_end":
        raise FNSFTError("truncation_mode=keep_end would cut images off; set keep_start, or max_length to null")


def _check_lengths(args: SFTConfig, given: Mapping[str, Any], is_vision: bool) -> None:
    packs_evaluation = args.packing if args.eval_packing is None else args.eval_packing
    if (args.packing or packs_evaluation) and args.max_length is None:
        raise FNSFTError("packing fills rows up to max_length, which is null; set max_length, or drop packing")
    padding_free = args.padding_free or (args.packing and args.packing_strategy in ("bfd", "bfd_split"))
    if padding_free and given.get("data_collator") is not None:
        raise FNSFTError("data_collator does not go with padding_free or packing, which bring their own; drop it")
    if padding_free and not args.packing and args.max_length is not None and not is_vision:
        raise FNSFTError(
            f"padding_free without packing cuts no row at max_length={args.max_length}; set packing to true, or "
            "max_length to null"
        )


def _check_columns(args: SFTConfig, sample: Mapping, name: str) -> None:
    is_pair = {"prompt", "completion"} <= sample.keys()
    if "input_ids" in sample or is_pair or is_conversational_from_value(sample):
        return
    if sample.get("messages") and is_conversational(sample):
        return
    if not isinstance(sample.get(args.dataset_text_field), str) or "prompt" in sample:
        raise FNSFTError(
            f"{name} has the columns {', '.join(map(repr, sample))}; SFTTrainer reads prompt and completion, "
            f"messages, input_ids or the text in {args.dataset_text_field!r} (dataset_text_field); to_trl_format "
            "reads many others"
        )


def _check_loss(args: SFTConfig, given: Mapping[str, Any], sample: Mapping) -> None:
    is_pair = {"prompt", "completion"} <= sample.keys()
    if given.get("formatting_func") is not None and (
        args.completion_only_loss or (args.completion_only_loss is None and is_pair)
    ):
        raise FNSFTError(
            "formatting_func makes one text of prompt and completion, and completion_only_loss keeps them apart; set "
            "completion_only_loss to False, or drop formatting_func"
        )
    if args.completion_only_loss and not is_pair and not sample.keys() & {"labels", "completion_mask"}:
        raise FNSFTError(
            f"completion_only_loss has no effect on the columns {', '.join(map(repr, sample))}, which have no "
            "completion; drop it, or set assistant_only_loss for messages"
        )
    if args.assistant_only_loss and not (is_conversational(sample) or is_conversational_from_value(sample)):
        raise FNSFTError(
            f"assistant_only_loss needs conversations, and the rows have the columns {', '.join(map(repr, sample))}; "
            "drop it, or give messages, or prompt and completion as messages"
        )


def _check_evaluation(args: SFTConfig, given: Mapping[str, Any]) -> None:
    if args.eval_strategy not in (None, "no") and given.get("eval_dataset") is None:
        raise FNSFTError(
            f"eval_strategy is {args.eval_strategy.value}, and there is no eval_dataset; give one, or set "
            "eval_strategy to no"
        )
    if (args.save_strategy == "best" or args.load_best_model_at_end) and args.metric_for_best_model is None:
        raise FNSFTError("the best model is asked for by no metric; set metric_for_best_model")
    function = given.get("compute_metrics")
    takes = inspect.signature(function).parameters if function is not None else ("compute_result",)
    if args.batch_eval_metrics and "compute_result" not in takes:
        raise FNSFTError("batch_eval_metrics needs a compute_metrics that takes compute_result; add it, or drop one")


def _check_model(args: SFTConfig, given: Mapping[str, Any]) -> None:
    model, settings = given["model"], args.model_init_kwargs or {}
    if given.get("quantization_config") is not None and "quantization_config" in settings:
        raise FNSFTError("quantization_config is given twice, also in model_init_kwargs; drop that one")
    peft_config = given.get("peft_config")
    if isinstance(peft_config, PeftConfig) and (target := _head_target(model, peft_config)):
        raise FNSFTError(
            f"target_modules has {target!r}, the head of the model, whose adapter SFTTrainer would not train; take it "
            "out"
        )
    for name, dataset in datasets_of(given):
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            check_ids(dataset, name, _vocabulary(model, settings, args.trust_remote_code))
    if args.router_aux_loss_coef and not hasattr(
        _text_config(model, settings, args.trust_remote_code), "output_router_logits"
    ):
        raise FNSFTError(
            f"router_aux_loss_coef is {args.router_aux_loss_coef}, and the model is no mixture of experts that gives "
            "its router's logits; drop it"
        )
    is_named = isinstance(model, str)  # and is shared out unless the map is null
    is_shared = settings.get("device_map", "auto") is not None if is_named else hasattr(model, "hf_device_map")
    if args.n_gpu > 1 and not is_shared:
        raise FNSFTError(
            f"{args.n_gpu} GPUs are visible to one process, and SFTTrainer does not share a model out among them; "
            "start it by accelerate launch, or show it one (CUDA_VISIBLE_DEVICES)"
        )


def _head_target(model: str | PreTrainedModel, peft_config: PeftConfig) -> str | None:
    """The target of an adapter that is the model's head."""
    heads = ["lm_head"]
    if not isinstance(model, str):
        head = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if head is not None and module is head]
    targets = getattr(peft_config, "target_modules", None) or []
    if isinstance(targets, str):  # a regular expression, or a word of PEFT's that leaves the head out
        return next((targets for head in heads if re.fullmatch(targets, head)), None)
    return next((target for target in targets for head in heads if f".{head}".endswith(f".{target}")), None)


def _vocabulary(model: str | PreTrainedModel, settings: Mapping, trust_remote_code: bool) -> int:
    """The number of tokens that a model has embeddings for."""
    if isinstance(model, str):
        return _text_config(model, settings, trust_remote_code).vocab_size
    return model.get_input_embeddings().num_embeddings


def _text_config(model: str | PreTrainedModel, settings: Mapping, trust_remote_code: bool) -> PreTrainedConfig:
    if isinstance(model, str):
        return AutoConfig.from_pretrained(
            model,
            revision=settings.get("revision"),
            trust_remote_code=settings.get("trust_remote_code", trust_remote_code),
        ).get_text_config()
    return model.config.get_text_config()
