"""From the options of a run to the datasets and the tokenizer of its trainer."""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from transformers.utils import logging

from ..errors import FNSFTError
from .config import DataConfig
from .conversion import TYPES, convert
from .dialects import dialect_of
from .messages import PLAIN, Dialect
from .notes import say_marks, say_thoughts
from .prompts import adds_bos, adds_eos, set_chat_template, teach_end, without_bos
from .rendering import answers_template, refusal
from .sources import load_data
from .together import is_prompted, put_together


logger = logging.get_logger(__name__)

_EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
_DEFAULT_EVAL_SPLIT = "test"  # of TRL's ScriptArguments


class TrainingData(NamedTuple):
    """What a trainer is given.

    Attributes:
        train (`Dataset`): rows in TRL's format.
        eval (`Dataset`, *optional*): the same to evaluate on.
        processing_class: the tokenizer or processor, with the chat template of the prompt format.
    """

    train: Dataset
    eval: Dataset | None
    processing_class: object


def load_training_data(
    script_args,
    training_args,
    mixture,
    data_config: DataConfig,
    processing_class,
    *,
    held_out: Sequence[str] | None = None,
) -> TrainingData:
    """Load, convert, sample and split the data of a run, and give the tokenizer its prompt format.

    Args:
        script_args: TRL's `ScriptArguments`; `dataset_name` may be several names with commas between.
        training_args: TRL's `SFTConfig`. Its `eos_token` is set where the prompt format ends an answer with another
            special token than the tokenizer's EOS token.
        mixture: TRL's `DatasetMixtureConfig`; the datasets of a mixture may each be in another format.
        data_config: the options of this package.
        processing_class: the tokenizer or processor of the model, changed in place.
        held_out: datasets to evaluate on in the place of what the run would hold out, all rows of each.

    Raises:
        FNSFTError: no dataset, two ways of naming it, one that cannot be read, a split that is not there, rows that do
            not go together, or a prompt format that the tokenizer cannot follow.
    """
    _check_options(script_args, training_args, mixture, data_config)
    evaluates = training_args.eval_strategy != "no" and held_out is None
    has_template_file = _read_template_file(processing_class, training_args)
    options = {
        "columns": data_config.columns,
        "text_field": training_args.dataset_text_field,
        "dialect": _dialect(processing_class, training_args, data_config),
    }
    if mixture.datasets:
        train, evaluation = _mixture(mixture, data_config, training_args.seed, evaluates, options)
    elif script_args.dataset_name:
        parts = [
            _splits(name, script_args, data_config, training_args.seed, evaluates, options)
            for name in _names(script_args.dataset_name)
        ]
        train = put_together([train for train, _ in parts])
        evaluation = _together(evaluation for _, evaluation in parts if evaluation is not None)
    else:
        raise FNSFTError("there is no dataset; give dataset_name (a Hub id or a file) or datasets (a mixture)")
    if held_out is not None:
        evaluation = _together(_held_out(name, options) for name in held_out)
    is_rendered = is_prompted(train) or "messages" in train.column_names
    _check_columns(train, evaluation, training_args, data_config, is_rendered)
    known = {"is_rendered": is_rendered, "has_template_file": has_template_file}
    _set_prompt_format(processing_class, training_args, data_config, **known)
    if is_rendered and training_args.chat_template_path is None:
        _check_rendered(train, processing_class)
        say_thoughts(train, processing_class, assistant_only_loss=training_args.assistant_only_loss)
    if training_args.dataset_text_field in train.column_names:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        say_marks(train, tokenizer, training_args.dataset_text_field)
        train = _without_bos(train, tokenizer, training_args.dataset_text_field)
        if evaluation is not None:
            evaluation = _without_bos(evaluation, tokenizer, training_args.dataset_text_field)
    return TrainingData(train, evaluation, processing_class)


def _check_options(script_args, training_args, mixture, data_config: DataConfig) -> None:
    """What can be refused before any data is loaded."""
    if script_args.dataset_streaming or mixture.streaming:
        raise FNSFTError("dataset_streaming is not supported by fnsft train; use FNSFTTrainer in Python")
    if mixture.datasets and script_args.dataset_name:
        raise FNSFTError("dataset_name and datasets are both given; drop one of them")
    if training_args.chat_template_path is not None and data_config.template_format not in ("auto", "chat"):
        raise FNSFTError(
            f"chat_template_path and template_format={data_config.template_format} both name a chat template; drop one"
        )


def _check_columns(
    train: Dataset, evaluation: Dataset | None, training_args, data_config: DataConfig, is_rendered: bool
) -> None:
    """What the columns of the data do not go together with."""
    if evaluation is not None and is_prompted(train) != is_prompted(evaluation):
        raise FNSFTError(
            f"the rows to train on have the columns {', '.join(train.column_names)}, those to evaluate on "
            f"{', '.join(evaluation.column_names)}; give both in one format"
        )
    if not is_rendered and data_config.template_format != "auto":
        raise FNSFTError(
            f"template_format={data_config.template_format} has no effect on the columns "
            f"{', '.join(train.column_names)}, which are trained as they are; drop it"
        )
    if training_args.completion_only_loss and not is_prompted(train):
        instead = "set assistant_only_loss instead" if is_rendered else "drop it"
        raise FNSFTError(
            f"completion_only_loss has no effect on the columns {', '.join(train.column_names)}, whose rows have no "
            f"completion; {instead}"
        )


def _names(dataset_name: str) -> list[str]:
    if os.path.exists(os.path.expanduser(dataset_name)):
        return [dataset_name]
    return [name.strip() for name in dataset_name.split(",") if name.strip()]


def _splits(name: str, script_args, data_config: DataConfig, seed: int, evaluates: bool, options: dict):
    """The rows of one dataset to train on, and those to evaluate on if that is asked for."""
    data = load_data(name, config_name=script_args.dataset_config)
    train_split, eval_split = script_args.dataset_train_split, script_args.dataset_test_split
    if train_split not in data:
        raise FNSFTError(
            f"the dataset {name} has no split {train_split!r}; it has {', '.join(data)}; set dataset_train_split"
        )
    held_out = None
    if evaluates:
        held_out = eval_split if eval_split in data else None
        if held_out is None and eval_split != _DEFAULT_EVAL_SPLIT:
            raise FNSFTError(
                f"the dataset {name} has no split {eval_split!r}; it has {', '.join(data)}; set dataset_test_split"
            )
        others = [split for split in _EVAL_SPLITS if split in data and split != train_split]
        held_out = held_out or next(iter(others), None)
    train = _converted(data, train_split, name, data_config, seed, options)
    if not evaluates:
        return train, None
    if held_out is not None and held_out != train_split:
        if held_out != eval_split:
            logger.warning(f"the dataset {name} has no split {eval_split!r}: evaluating on its split {held_out!r}")
        return train, _converted(data, held_out, name, data_config, seed, options)
    return _split(train, data_config.eval_fraction, seed, name)


def _together(parts: Iterable[Dataset]) -> Dataset | None:
    """The rows of all parts; `None` where there is none."""
    parts = list(parts)
    return put_together(parts) if parts else None


def _held_out(name: str, options: dict) -> Dataset:
    """All rows of a dataset that is evaluated on: of its split for that, if it has several."""
    data = load_data(name)
    split = next((split for split in _EVAL_SPLITS if split in data), next(iter(data)))
    return convert(data[split], name=f"the split {split!r} of the dataset {name}", **options)


def _converted(data: DatasetDict, split: str, name: str, data_config: DataConfig, seed: int, options: dict) -> Dataset:
    rows = _sample(data[split], data_config.max_samples, seed)
    return convert(rows, name=f"the split {split!r} of the dataset {name}", **options)


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or len(rows) <= count:
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def _split(rows: Dataset, share: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Hold a share of the rows out, by a seed; both parts keep the order of the dataset."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise FNSFTError(f"the dataset {name} has {len(rows)} rows, too few to hold {count} out; give an eval split")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    logger.warning(
        f"the dataset {name} has no split to evaluate on: {count} of its {len(rows)} rows are held out (eval_fraction "
        f"{share:g}, seed {seed})"
    )
    return rows.select([i for i in range(len(rows)) if i not in held_out]), rows.select(sorted(held_out))


def _mixture(mixture, data_config: DataConfig, seed: int, evaluates: bool, options: dict):
    """As TRL's `get_dataset`, with each dataset in its own format and a split by the seed."""
    parts = []
    for part in mixture.datasets:
        try:
            rows = load_data(
                part.path, config_name=part.name, split=part.split, data_dir=part.data_dir, data_files=part.data_files
            )
            rows = rows if part.columns is None else rows.select_columns(part.columns)
        except FNSFTError:
            raise
        except (ValueError, KeyError) as error:
            raise FNSFTError(f"the mixture has columns that {part.path} does not have: {error}") from error
        rows = _sample(rows, data_config.max_samples, seed)
        parts.append(convert(rows, name=f"the dataset {part.path}", **options))
    shares = [part.fraction for part in mixture.datasets]
    if any(share is not None for share in shares):
        if any(share is None or share < 0 for share in shares) or sum(shares) == 0:
            raise FNSFTError(
                "fraction must be given for every dataset of the mixture or for none, and not be 0 for all"
            )
        weights = [share / sum(shares) for share in shares]
        total = min(len(rows) / weight for rows, weight in zip(parts, weights, strict=True) if weight > 0)
        parts = [rows.select(range(round(w * total))) for rows, w in zip(parts, weights, strict=True)]
    rows = put_together(parts)
    if mixture.test_split_size is None and not evaluates:
        return rows, None
    train, evaluation = _split(rows, mixture.test_split_size or data_config.eval_fraction, seed, "mixture")
    return train, evaluation if evaluates else None


def _check_rendered(train: Dataset, processing_class) -> None:
    """See that the chat template renders one of the rows, before a model is loaded."""
    reason = None
    for row in train.select_columns([name for name in train.column_names if name in TYPES]):
        reason = refusal(row, processing_class)
        if reason is None:
            return
    raise FNSFTError(f"no row can be trained on: {reason} in the last; set another template_format, or other rows")


def _read_template_file(processing_class, training_args) -> bool:
    """Set the chat template that `chat_template_path` names, if it is a file."""
    path = training_args.chat_template_path
    if path is None or not path.endswith((".jinja", ".j2")):
        return False
    try:
        processing_class.chat_template = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FNSFTError(
            f"the chat template {path} cannot be read ({error.strerror}); give one that can be read"
        ) from error
    training_args.chat_template_path = None  # or TRL would read it again, over what is changed below
    return True


def _dialect(processing_class, training_args, data_config: DataConfig) -> Dialect:
    """What the chat template that will render the rows reads of them; the plain dialect of one not loaded yet."""
    if training_args.chat_template_path is not None:
        return PLAIN
    if data_config.template_format in ("auto", "chat") and processing_class.chat_template is not None:
        return dialect_of(processing_class)
    return replace(PLAIN, writes_calls=False)  # of this package's own templates


def _set_prompt_format(
    processing_class, training_args, data_config: DataConfig, *, is_rendered: bool, has_template_file: bool
) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if training_args.eos_token is not None:
        if training_args.eos_token not in tokenizer.get_vocab():
            raise FNSFTError(
                f"eos_token is {training_args.eos_token!r}, which is no token of the tokenizer; name one of its tokens"
            )
        tokenizer.eos_token = training_args.eos_token
    eos_token = tokenizer.eos_token
    if training_args.chat_template_path is not None:
        return  # TRL takes the template of another tokenizer, with tokens that the model needs room for
    name, template = data_config.template_format, data_config.prompt_template
    if is_rendered and not has_template_file and set_chat_template(processing_class, name, template):
        logger.warning(
            f"conversations are rendered as {_name_of(data_config)}; the saved tokenizer has the chat template for it"
        )
    if tokenizer.eos_token is None:
        raise FNSFTError(
            "the tokenizer has no EOS token, so a model would never learn to stop; name one with eos_token"
        )
    if is_rendered:
        keep_eos = training_args.eos_token is not None
        keep_template = training_args.assistant_only_loss and answers_template(processing_class) is not None
        if note := teach_end(processing_class, keep_eos=keep_eos, keep_template=keep_template):
            logger.warning(note)
    if tokenizer.eos_token != eos_token:
        if training_args.eos_token is not None:
            raise FNSFTError(
                f"eos_token is {training_args.eos_token}, but template_format={data_config.template_format} ends an "
                f"answer with {tokenizer.eos_token}; drop one of them"
            )
        training_args.eos_token = tokenizer.eos_token  # TRL tells the model


def _name_of(data_config: DataConfig) -> str:
    return "basic" if data_config.template_format == "auto" else data_config.template_format


def _without_bos(rows: Dataset, tokenizer, column: str) -> Dataset:
    """Rows of text without the BOS token that the tokenizer will write in front."""
    if adds_eos(tokenizer):
        raise FNSFTError(
            "the tokenizer appends its EOS token to text, and TRL appends another; set add_eos_token to false in its "
            "tokenizer_config.json"
        )
    if not adds_bos(tokenizer):
        return rows
    bos = tokenizer.bos_token
    count = sum(text.startswith(bos) for batch in rows.select_columns([column]).iter(1000) for text in batch[column])
    if count == 0:
        return rows
    logger.warning(f"{count} texts begin with {bos}, which the tokenizer adds itself: it is taken off them")
    return rows.map(lambda row: {column: without_bos(row[column], bos)}, load_from_cache_file=False)
