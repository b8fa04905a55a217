"""What of the rows does not reach the model as it is written, said before the training."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from datasets import Dataset
from transformers import ProcessorMixin
from transformers.utils import logging

from .rendering import RENDER_ERRORS, answers_template, template_arguments


logger = logging.get_logger(__name__)

_ROWS = 1000  # looked at
_MARK = re.compile(r"<\|\w+\|>")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def say_marks(rows: Dataset, tokenizer, column: str) -> None:
    """Say which marks of a chat format texts hold that are no tokens of the tokenizer."""
    texts = rows.select_columns([column]).select(range(min(_ROWS, len(rows))))
    marks = {mark for row in texts for mark in _MARK.findall(row[column])} - tokenizer.get_vocab().keys()
    if marks:
        logger.warning(
            f"texts hold {', '.join(sorted(marks)[:4])}, which the tokenizer has no token for: they are spelt in "
            "letters; take a tokenizer that has them, or read the turns (--columns messages=COLUMN)"
        )


def say_thoughts(rows: Dataset, processing_class, *, assistant_only_loss: bool) -> None:
    """Say that the chat template leaves out what a last answer thinks, if it does."""
    if isinstance(processing_class, ProcessorMixin):
        return
    template = answers_template(processing_class) if assistant_only_loss else None
    thinking = lost = 0
    for turns, thought, row in _thoughts(rows):
        try:
            text = processing_class.apply_chat_template(
                turns, tokenize=False, chat_template=template, **template_arguments(row)
            )
        except RENDER_ERRORS:
            continue  # it is left out and counted
        thinking, lost = thinking + 1, lost + (thought not in text)
    if lost:
        logger.warning(
            f"the chat template leaves out what {lost} of {thinking} last answers think (<think>...</think>, "
            "reasoning_content): it is not trained; set another template_format to train it"
        )


def _thoughts(rows: Dataset) -> Iterator[tuple[list[dict], str, Mapping]]:
    """The turns of rows whose last answer thinks, and what."""
    for row in islice(rows, _ROWS):
        turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        answer = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), {})
        written = answer.get("content")
        found = _THOUGHT.search(written) if isinstance(written, str) else None
        thought = (found[1] if found else answer.get("reasoning_content") or "").strip()
        if thought:
            yield turns, thought, row
