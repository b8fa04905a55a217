"""One run of `fnsft evaluate`: all that is asked for is found and checked, then each model loaded and scored."""

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from ..compat.accelerate import parse_flag_from_env
from ..config import FunctionalNetworkConfig
from ..data.formats import find_formats
from ..data.sources import load_data
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig, metric_name
from ..evaluation.evaluated import EvaluatedModel
from ..evaluation.evaluation import EvaluationData, ModelScores, check_data, evaluate_model
from ..evaluation.general import score_text
from ..evaluation.generation import check_generates, check_scores_of_text
from ..evaluation.harness import Tasks
from ..evaluation.retention import RetentionText
from ..evaluation.settings import EvaluationConfig
from ..evaluation.share import Share
from ..interventions.masking import forward_mask
from ..training.loaded import given_template
from ..training.preparation import keep_4bit_layers_differentiable
from ..training.retention_texts import RetentionTexts
from .evaluation_report import write_report
from .logs import hush_repetitions
from .masks import configured_mask
from .models import check_loading, loading_arguments, quantization_arguments
from .options.arguments import Arguments
from .options.loading import LoadingConfig


logger = logging.get_logger("fnsft_trl")

_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


@dataclass
class Evaluated:
    """What came of one model.

    Attributes:
        name (`str`): of the model.
        about (`dict`): what it is.
        scores (`ModelScores`): on rows and general text.
        others (`dict[str, float]`): values of tasks that are no means over rows.
        tasks (`dict[str, dict]`): about the tasks.
    """

    name: str
    about: dict[str, Any]
    scores: ModelScores = field(default_factory=ModelScores)
    others: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Reference:
    """What others are compared with token by token."""

    name: str
    model: nn.Module
    texts: dict[str, RetentionText]


@dataclass
class _Work:
    """What every model is scored on."""

    args: Arguments
    settings: EvaluationConfig
    data: list[EvaluationData]
    tasks: Tasks | None
    texts: RetentionTexts | None
    mask: FunctionalNetworkConfig | None
    share: Share
    device: torch.device


def evaluate(
    args: Arguments,
    settings: EvaluationConfig,
    loading: LoadingConfig,
    retention: RetentionConfig | None,
    mask: FunctionalNetworkConfig | None,
    models: dict[str, str],
    data: dict[str, str],
    output: Path,
) -> None:
    """Score models and write the report.

    Args:
        args: of the verb.
        settings: how rows are scored.
        loading: how models are loaded.
        retention: the general texts.
        mask: which neurons a mask silences, and how.
        models: name -> place.
        data: name -> source.
        output: directory of the report.

    Raises:
        FNSFTError: something that is asked for cannot be done.
    """
    # Without the flag, processes on a machine without an accelerator would not know of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    hush_repetitions(state.process_index)
    check_loading(loading, state.device.type, processes=state.num_processes)
    if settings.generate:
        check_scores_of_text()
    parts = [read_data(name, source, args.dataset_split, settings) for name, source in data.items()]
    tasks = Tasks(args.tasks, args.include_path, trusts=loading.trust_remote_code) if args.tasks else None
    texts = None if retention is None else RetentionTexts(retention)
    found = _found(models, args, loading, state.device)
    work = _Work(args, settings, parts, tasks, texts, mask, Share.of_launch(), state.device)
    for each in found:
        _check_model(each, work)
    results, about = _scored(found, work)
    state.wait_for_everyone()
    state.destroy_process_group()  # a process that ends in a group it has not left can abort
    if state.is_main_process:
        write_report(results, settings, output, {**about, "sources": data})


def read_data(name: str, source: str, split: str | None, settings: EvaluationConfig) -> EvaluationData:
    """Rows of a dataset, whose columns are known.

    Args:
        name: of the data.
        source: a Hub id, a directory or a file.
        split: which of its splits; one for tests by default.
        settings: how rows are read.

    Raises:
        FNSFTError: there is no such split, no row, or no known format.
    """
    splits = load_data(source)
    chosen = split or next((each for each in _SPLITS if each in splits), None) or next(iter(splits))
    if chosen not in splits:
        raise FNSFTError(
            f"the dataset {source} has no split {chosen!r}; it has {', '.join(splits)}; set dataset_split"
        )
    if len(splits) > 1 and split is None:
        logger.warning(f"of the dataset {source}, the split {chosen!r} is scored (dataset_split)")
    part = EvaluationData(name, splits[chosen])
    if not len(part.rows):
        raise FNSFTError(f"the dataset {source} is empty; at least one row was expected")
    try:
        if part.choice_format(settings) is None:
            find_formats(part.columns, chosen=settings.columns)
    except FNSFTError as error:
        raise FNSFTError(f"the dataset {source} {error}" if str(error).startswith("has ") else str(error)) from error
    return part


def _found(
    models: dict[str, str], args: Arguments, loading: LoadingConfig, device: torch.device
) -> list[EvaluatedModel]:
    """All models that are scored, in their order."""
    arguments = loading_arguments(loading) | quantization_arguments(loading, device)
    found = [EvaluatedModel.find(place, name=name, **arguments) for name, place in models.items()]
    if loading.model_revision is not None and len(found) > 1:
        raise FNSFTError("model_revision is of one model on the Hub, and several models are given; drop it")
    if args.base:
        base = next((each for each in found if each.adapter is not None), None)
        if base is None:
            raise FNSFTError("base: none of the models is an adapter, whose base would be scored; drop it")
        if "base" in models:
            raise FNSFTError(f"base: {models['base']} is called so already; give it another name, as NAME=MODEL")
        found.insert(0, base.base())
    if args.masked:
        with_mask = [each for model in found for each in (model, model.masked()) if each is not None]
        if len(with_mask) == len(found):
            raise FNSFTError(
                "masked: none of the models was trained under a mask (functional_networks/selection.json); drop it, "
                "or give ica_template_path and mask_mode"
            )
        found = with_mask
    return found


def _check_model(each: EvaluatedModel, work: _Work) -> None:
    """See, before any model is loaded, that one can be scored as it is asked for."""
    tokenizer = each.load_tokenizer()
    for part in work.data:
        check_data(part.sampled(work.settings.max_samples, work.settings.seed), tokenizer, work.settings)
    if work.mask is not None:
        template = given_template(work.mask, None)
        replace(template, base_model="").check_model(each.outline())  # the names are compared when weights are there


def _scored(found: list[EvaluatedModel], work: _Work) -> tuple[list[Evaluated], dict[str, Any]]:
    """Score each model in turn; the first one stays in memory where others are compared with it token by token."""
    results: list[Evaluated] = []
    about: dict[str, Any] = {}
    reference: _Reference | None = None
    for number, each in enumerate(found):
        where = "" if str(each.place) == each.name else f": {each.place}"
        logger.warning(f"scoring {each.name} ({number + 1} of {len(found)}){where}")
        tokenizer = each.load_tokenizer()
        model = each.load(work.device)
        if work.args.load_in_4bit:
            keep_4bit_layers_differentiable(model)  # packed layers refuse some widths
        if work.settings.generate:
            check_generates(model, tokenizer, each.name)
        texts = _texts(work, tokenizer)
        if number == 0:
            about["retention"] = {name: {"tokens": text.tokens, "sha256": text.sha256} for name, text in texts.items()}
        mask = None if work.mask is None or each.is_masked else configured_mask(work.mask, model)
        if reference is None and texts and (len(found) > 1 or mask is not None):
            reference = _Reference(each.name, model, texts)
        results.append(_score(Evaluated(each.name, each.about(model)), model, tokenizer, texts, reference, work))
        if mask is not None:
            name = f"{each.name} ({work.mask.mask_mode})"
            described = {"name": name, "mask": work.mask.mask_mode, "neurons": mask.count, "sha256": mask.sha256}
            with forward_mask(model, work.mask.mask_mode, mask, factor=work.mask.mask_factor):
                result = Evaluated(name, each.about(model) | described)
                results.append(_score(result, model, tokenizer, texts, reference, work))
        del model
        gc.collect()
    return results, about


def _texts(work: _Work, tokenizer) -> dict[str, RetentionText]:
    if work.texts is None:
        return {}
    tokens = work.texts.config.retention_tokens
    return {
        name: RetentionText.from_texts(rows, tokenizer, max_tokens=tokens, name=f"the text {name}")
        for name, rows in work.texts.texts.items()
    }


def _score(
    result: Evaluated,
    model: nn.Module,
    tokenizer,
    texts: dict[str, RetentionText],
    reference: _Reference | None,
    work: _Work,
) -> Evaluated:
    """Score one model, as it is, on everything."""
    settings = work.settings
    if work.data:
        result.scores = evaluate_model(model, tokenizer, work.data, settings, share=work.share)
    for name, text in texts.items():
        is_same = reference is not None and reference.texts[name].sha256 == text.sha256
        if reference is not None and not is_same:
            logger.warning(
                f"{result.name} has another tokenizer than {reference.name}, which makes other tokens of the text "
                f"{name}: there is no KL between them, and their cross-entropies are of different tokens"
            )
        measures = score_text(
            model,
            text,
            reference=reference.model if is_same and result.name != reference.name else None,
            batch_size=work.texts.config.retention_batch_size,
            share=work.share,
            name=f"retention: {name}",
        )
        result.scores.measures |= {metric_name(name, measure): found for measure, found in measures.items()}
    if work.tasks is not None:
        found = work.tasks.run(
            model,
            tokenizer,
            num_fewshot=work.args.num_fewshot,
            limit=work.args.limit,
            apply_chat_template=settings.apply_chat_template,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            share=work.share,
        )
        result.scores.measures |= found.measures
        result.others, result.tasks = found.others, found.about
    return result
