"""Multiple choice by likelihood, as lm-evaluation-harness has it."""

import math
from collections.abc import Sequence

from torch import nn

from ..data.choices import ChoiceRow
from ..errors import FNSFTError
from .measures import Measure
from .metrics import evaluating, score_batch
from .share import ALONE, Share


DELIMITER = " "  # between a question and an answer


def choice_requests(
    row: ChoiceRow, tokenizer, *, apply_chat_template: bool = False, max_length: int | None = None
) -> list[tuple[list[int], int]]:
    """Token ids of a question with each of its answers, and how many of them are the answer's.

    White space at the question's end goes with the answer; a question in a chat template is not followed by a
    [`DELIMITER`]. What is longer than `max_length` loses tokens at its beginning.
    """
    context, delimiter = row.question, DELIMITER
    if apply_chat_template:
        if tokenizer.chat_template is None:
            raise FNSFTError("apply_chat_template needs a tokenizer with a chat template; drop it, or set one on it")
        turns = [{"role": "user", "content": context}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        delimiter = ""
    if not context:
        raise FNSFTError("a question is empty; give rows with one")
    kept = context.rstrip()
    found = []
    for choice in row.choices:
        before = _encoded(kept, tokenizer)
        whole = _encoded(context + delimiter + choice, tokenizer)
        answer = max(1, len(whole) - len(before))
        if max_length is not None:
            whole = whole[-max_length:]
        found.append((whole, answer))
    return found


def _encoded(text: str, tokenizer) -> list[int]:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if text.startswith(tokenizer.decode(prefix)):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def score_choices(
    model: nn.Module,
    tokenizer,
    rows: Sequence[ChoiceRow],
    *,
    apply_chat_template: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    share: Share = ALONE,
    name: str = "choices",
) -> list[list[float]]:
    """The log-likelihood of every answer of every question, in nats.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: the questions.
        apply_chat_template: put a question into the chat template, as a user's turn.
        max_length: the longest sequence; the beginning of longer ones is left out.
        batch_size: answers in a forward pass.
        share: the part of this process.
        name: of the work, beside the progress.
    """
    options = {"apply_chat_template": apply_chat_template, "max_length": max_length}
    of_rows = [choice_requests(row, tokenizer, **options) for row in rows]
    requests = [request for requests in of_rows for request in requests]

    def work(numbers: list[int]) -> list[float]:
        batch = [requests[number] for number in numbers]
        firsts = [max(1, len(ids) - answer) for ids, answer in batch]
        scored = score_batch(model, [ids for ids, _ in batch], firsts)
        return [-float(score.nll.sum()) for score in scored]

    with evaluating(model):
        lengths = [len(ids) for ids, _ in requests]
        found = iter(share.in_batches(work, lengths, batch_size=batch_size, name=name))
    return [[next(found) for _ in requests] for requests in of_rows]


def choice_measures(rows: Sequence[ChoiceRow], likelihoods: Sequence[Sequence[float]]) -> dict[str, Measure]:
    """How often the right answer is the likeliest: `acc`, and `acc_norm` by its likelihood for each character, and
    `acc_bytes` for each byte of it in UTF-8. None is where the model rules out all answers (-inf).

    Args:
        rows: the questions.
        likelihoods: of [`score_choices`].
    """
    lengths = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode()),
    }
    measures = {}
    for name, length in lengths.items():
        right = []
        for row, values in zip(rows, likelihoods, strict=True):
            normed = [value / length(choice) for value, choice in zip(values, row.choices, strict=True)]
            best = max(normed)
            right.append(float(best > -math.inf and normed.index(best) == row.answer))
        measures[name] = Measure.of_rows(right, [row.number for row in rows], rises=True)
    return measures
