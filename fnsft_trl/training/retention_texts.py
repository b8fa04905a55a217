"""RetentionTexts: what a RetentionConfig names, read before a model is loaded, and put on a trainer as series."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.embedded import EMBEDDED, wikipedia_passages
from ..data.rendering import template_arguments
from ..data.sources import load_texts
from ..errors import FNSFTError
from ..evaluation.config import TASK, RetentionConfig
from ..evaluation.overlap import SharedRows, written
from ..evaluation.retention import RetentionText
from .retention import RetentionCallback


logger = logging.get_logger(__name__)

_CHARACTERS = 24  # a token, more than any tokenizer makes of text: what is read of a source
_LEAST = 1000  # rows of a stream of training data that are compared
_IGNORED = -100  # the label of a token that is not learnt


def read_texts(option: str, name: str, source: str, *, tokens: int, embedded: str = "discovery") -> list:
    """Rows of a source of general text, in its order, until they hold enough characters.

    Args:
        option: that names it, for messages.
        name: of the text.
        source: of the rows.
        tokens: that they are to hold.
        embedded: which half of the articles `embedded` is: those of `"discovery"`, or of `"retention"`.

    Raises:
        FNSFTError: it cannot be read, or holds no text.
    """
    if source == EMBEDDED:
        rows: Iterable = wikipedia_passages(embedded)
    else:
        (rows,) = load_texts([source]).values()
    found, characters = [], 0
    for row in rows:
        if pieces := written(row):
            found.append(row)
            characters += sum(map(len, pieces))
        if characters >= _CHARACTERS * tokens:
            break
    if not found:
        raise FNSFTError(f"the text {name!r} ({source}) of {option} holds no text; give some sentences")
    return found


class RetentionTexts:
    """The texts of a RetentionConfig.

    Args:
        config ([`RetentionConfig`]): what is asked for.
        processing_class (*optional*): the tokenizer or processor, if it is known yet and final; without it, texts are
            tokenised when they are put on a trainer.

    Attributes:
        texts (`dict[str, list]`): name of a series -> as many of its rows as hold the tokens that are wanted.

    Raises:
        FNSFTError: a source cannot be read, or holds no text.
    """

    def __init__(self, config: RetentionConfig, processing_class=None) -> None:
        self.config = config
        self.texts = {
            name: read_texts("retention_datasets", name, source, tokens=config.retention_tokens, embedded="retention")
            for name, source in config.sources().items()
        }
        self._tokenized: dict[str, RetentionText] | None = None
        if processing_class is not None:
            self._tokenized = self._tokenize(processing_class)

    @classmethod
    def of(
        cls, config: RetentionConfig | None, args, train_dataset, processing_class, formatting_func: Callable | None
    ) -> "RetentionTexts | None":
        """The texts of a config, compared with the training data; `None` without one.

        Args:
            config: what is asked for.
            args, train_dataset, processing_class, formatting_func: of the trainer, as it is given them.
        """
        if config is None:
            return None
        is_final = getattr(args, "chat_template_path", None) is None  # or TRL changes the tokenizer
        found = cls(config, processing_class if is_final else None)
        if args is None or args.process_index == 0:
            found.warn_of_shared_rows(train_dataset, formatting_func)
        return found

    def _tokenize(self, processing_class) -> dict[str, RetentionText]:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        tokens = self.config.retention_tokens
        found = {
            name: RetentionText.from_texts(rows, tokenizer, max_tokens=tokens, name=f"the text {name}")
            for name, rows in self.texts.items()
        }
        for name, text in found.items():
            if text.tokens < tokens:
                logger.warning(f"the retention text {name!r} holds {text.tokens} tokens, not the {tokens} asked for")
        return found

    def warn_of_shared_rows(self, train_dataset, formatting_func: Callable | None = None) -> None:
        """Say for each series how many of its texts are trained on too.

        Args:
            train_dataset: the rows to train on, as they are given to the trainer. Of a stream the first 1,000 are
                read; tokenised rows cannot be compared.
            formatting_func: makes a text of a row.
        """
        if train_dataset is None:
            return
        is_stream = not isinstance(train_dataset, Dataset)
        names = getattr(train_dataset, "column_names", None)
        if names is not None and set(names) <= {"input_ids", "labels", "attention_mask", "completion_mask"}:
            logger.warning("the training data is tokenised, so it is not known whether retention texts are among it")
            return
        rows = tqdm(train_dataset, "comparing retention texts with the training data", leave=False, delay=5)
        rows = rows if formatting_func is None else map(formatting_func, rows)
        shared = SharedRows(self.texts).among(rows, most=_LEAST if is_stream else None)
        for name, texts in shared.items():
            where = f"the first {_LEAST} rows of the training data" if is_stream else "the training data"
            logger.warning(
                f"{len(texts)} of the {len(self.texts[name])} rows of the retention text {name!r} stand in {where} "
                f"too, so its rise says less of what is forgotten; the first is {texts[0]!r}"
            )

    def add_to(self, trainer) -> None:
        """Add a callback with all series to a trainer, that of the prompts of its task among them."""
        config = self.config
        texts = dict(self._tokenized or self._tokenize(trainer.processing_class))
        prompts = task_prompts(
            trainer.task_dataset,
            trainer.processing_class,
            tokens=config.retention_tokens,
            seed=trainer.args.seed,
        )
        if prompts is not None:
            texts[TASK] = prompts
        elif trainer.is_world_process_zero():
            logger.warning("the rows to train on have no prompts that are known, so retention/task/kl is not measured")
        settings = {"batch_size": config.retention_batch_size, "budget": config.retention_budget}
        settings["on_budget"] = config.retention_on_budget or "rollback"
        trainer.add_callback(RetentionCallback(trainer, texts, **settings))


def task_prompts(
    dataset: Dataset | IterableDataset | None, processing_class, *, tokens: int, seed: int
) -> RetentionText | None:
    """The prompts of a task: of its rows, as they are trained, all before the first token that is learnt, and it.

    So the last distribution of each is that over the beginning of the answer. A row of which every token is learnt
    (plain text, or a conversation without `assistant_only_loss`) has no prompt and counts as a whole.

    Args:
        dataset: rows with `input_ids` and perhaps `labels`, packed ones (`seq_lengths`) too, as SFTTrainer prepares
            them; with `prompt_ids`, as DPO and KTO do; or with a `prompt` as it is, as GRPO and RLOO do.
        processing_class: the tokenizer or processor.
        tokens: number of tokens to score.
        seed: of the order in which rows are drawn; of a stream, the first ones are taken.

    Returns:
        `None` where the rows have none of these columns, or hold no token that is learnt.
    """
    if dataset is None:
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    prompts, found = [], 0
    for row in _drawn(dataset, tokens, seed):
        for ids in _prompts(row, tokenizer):
            ids = ids[: tokens - found + 1]
            if len(ids) > 1:
                prompts.append(ids)
                found += len(ids) - 1
        if found >= tokens:
            break
    return RetentionText.of_sequences(prompts) if prompts else None


def _drawn(dataset: Dataset | IterableDataset, tokens: int, seed: int) -> Iterator[dict]:
    if not isinstance(dataset, Dataset):
        return islice(dataset, tokens)
    order = random.Random(seed).sample(range(len(dataset)), min(len(dataset), tokens))
    return (dataset[number] for number in order)


def _prompts(row: dict, tokenizer) -> Iterator[list[int]]:
    """The prompts of one row, each with the token after it."""
    if "input_ids" in row:
        yield from _not_learnt(row)
    elif "prompt_ids" in row:
        answer = row.get("completion_ids") or row.get("chosen_ids") or row["prompt_ids"]
        yield [*row["prompt_ids"], answer[0]]
    elif isinstance(row.get("prompt"), str):
        ids = tokenizer(row["prompt"])["input_ids"]
        yield [*ids, ids[-1]] if ids else []  # whatever comes after it: its distribution is compared, not its token
    elif isinstance(row.get("prompt"), list):
        arguments = template_arguments(row)
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True, **arguments)
        yield [*ids["input_ids"], ids["input_ids"][-1]]


def _not_learnt(row: dict) -> Iterator[list[int]]:
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    start = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        part, own = ids[start : start + length], labels[start : start + length]
        learnt = next((place for place, label in enumerate(own) if label != _IGNORED), None)
        start += length
        if learnt is not None:
            yield list(part[: learnt + 1]) if learnt else list(part)
