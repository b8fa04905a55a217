"""score_task: how well a model answers the rows of a task, as a number from 0 to 1."""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from torch import nn

from ..evaluation.generation import generate_answers, text_measures
from ..evaluation.metrics import score_rows
from ..evaluation.rows import EvaluationRow, RowReader, read_rows
from .tasks import Task


def score_task(
    model: nn.Module, tokenizer, task: Task, *, batch_size: int, max_length: int | None = None
) -> dict[str, Any]:
    """Score the test rows of a task by its scorer.

    Args:
        model: a causal language model; it is left in the mode that it was in.
        tokenizer: that it is trained with, with its prompt format.
        task: the task.
        batch_size: rows per forward pass.
        max_length: the longest row in tokens that is scored.

    Returns:
        `score`: the mean over rows, from 0 to 1; higher is better. `rows`: of each row, in their order; `nll`: mean
        negative log-likelihood of the expected answers, in nats; `left_out`: rows that are longer than `max_length`.

    Raises:
        FNSFTError: no row can be scored.
    """
    reader = RowReader(tokenizer, max_length=max_length)
    read, _ = read_rows(task.test, reader, name=f"task {task.name}")
    scores = score_rows(model, read, batch_size=batch_size)
    if task.config.scorer == "exact_match":
        values = [float(score.is_exact) for score in scores]
    elif task.config.scorer == "choice":
        values = _chosen(model, reader, task, [task.test[row.number] for row in read], batch_size)
    else:
        values = _near(model, tokenizer, task, read, batch_size)
    return {
        "score": fmean(values),
        "rows": [round(value, 6) for value in values],
        "nll": fmean(score.answer_nll for score in scores),
        "left_out": len(task.test) - len(read),
    }


def _chosen(model: nn.Module, reader: RowReader, task: Task, rows: Sequence[dict], batch_size: int) -> list[float]:
    """Whether the expected answer is the likeliest of all; none is where the model rules out all."""
    options = [row | {"completion": choice} for row in rows for choice in task.choices(row)]
    options, _ = read_rows(options, RowReader(reader.tokenizer), name=f"the answers of task {task.name}")
    likelihoods = iter([score.answer_nll for score in score_rows(model, options, batch_size=batch_size)])
    found = []
    for row in rows:
        nll = {choice: next(likelihoods) for choice in task.choices(row)}
        best = min(nll, key=nll.get)
        found.append(float(nll[best] < math.inf and best == row["completion"]))
    return found


def _near(model: nn.Module, tokenizer, task: Task, rows: Sequence[EvaluationRow], batch_size: int) -> list[float]:
    """How near generated answers come to the expected ones."""
    answers = generate_answers(
        model,
        tokenizer,
        [row.prompt for row in rows],
        max_new_tokens=task.config.max_new_tokens,
        batch_size=batch_size,
    )
    texts, expected = [answer.text.strip() for answer in answers], [row.reference.strip() for row in rows]
    if task.config.scorer == "similarity":
        return [SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in zip(texts, expected, strict=True)]
    return text_measures(texts, expected, [row.number for row in rows])["rougeL"].per_row
