"""Scores of a model's answers, teacher-forced: no text is generated."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..finite import check_finite
from .rows import EvaluationRow, RowReader
from .share import ALONE, Share


@dataclass
class TokenScores:
    """Scores of the scored tokens of one sequence.

    Attributes:
        nll (`torch.Tensor`): negative log-likelihood in nats, shape (scored tokens,); infinite where the model rules
            the token out.
        is_top1 (`torch.Tensor`): whether the token was the most likely one, shape (scored tokens,).
    """

    nll: torch.Tensor
    is_top1: torch.Tensor


def score_tokens(
    model: nn.Module, sequences: Sequence[list[int]], first_scored: Sequence[int], *, batch_size: int = 4
) -> Iterator[TokenScores]:
    """Score the tokens of sequences, each given all before it; sequences of similar length share a batch.

    Args:
        model: a causal language model, used in evaluation mode and left in the mode it was in.
        sequences: token ids.
        first_scored: for each sequence, the index (at least 1) of the first token to score.
        batch_size: sequences per forward pass.

    Yields:
        [`TokenScores`] in the order of the sequences.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    results: list[TokenScores | None] = [None] * len(sequences)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scored = score_batch(model, [sequences[i] for i in batch], [first_scored[i] for i in batch])
            for i, score in zip(batch, scored, strict=True):
                results[i] = score
    yield from results


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, without gradients, left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def model_inputs(sequences: Sequence[list[int]], device: torch.device) -> dict:
    """The arguments of a forward pass over sequences, padded on the right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # (sequences, positions)
    present = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        present[row, : len(sequence)] = 1
    return {"input_ids": ids.to(device), "attention_mask": present.to(device), "use_cache": False}


def token_scores(logits: torch.Tensor, ids: torch.Tensor, first: int, last: int) -> TokenScores:
    """Scores of the tokens of one sequence.

    Args:
        logits: shape (positions, vocabulary).
        ids: shape (positions,).
        first: the first token to score, at least 1.
        last: the end of the sequence.

    Returns:
        The scores; the negative log-likelihood of a token that the model rules out (a logit of -inf) is infinite.

    Raises:
        FNSFTError: the largest logit is NaN or infinite, so that no token is the most likely.
    """
    predicted = logits[first - 1 : last - 1].float()  # (scored tokens, vocabulary)
    target = ids[first:last]
    nll = nn.functional.cross_entropy(predicted, target, reduction="none").cpu()
    if not nll.isfinite().all():
        check_finite(predicted.amax(-1).tolist(), f"the largest logits of a model, in {logits.dtype}")
    return TokenScores(nll, (predicted.argmax(-1) == target).cpu())


def score_batch(model: nn.Module, sequences: Sequence[list[int]], first_scored: Sequence[int]) -> list[TokenScores]:
    """As [`score_tokens`], for sequences that share one forward pass, under [`evaluating`]."""
    inputs = model_inputs(sequences, input_device(model))
    logits = model(**inputs).logits
    rows = enumerate(zip(sequences, first_scored, strict=True))
    return [token_scores(logits[row], inputs["input_ids"][row], first, len(ids)) for row, (ids, first) in rows]


@dataclass
class CompletionScores:
    """How well a model answers prompts.

    Attributes:
        exact_match (`float`): share of rows whose whole completion, end of sequence included, is the greedy answer.
        nll (`float`): mean over rows of the negative log-likelihood of the completion, in nats.
        rows (`int`): number of rows.
    """

    exact_match: float
    nll: float
    rows: int


def score_completions(
    model: nn.Module, tokenizer, rows: Sequence[Mapping], *, batch_size: int = 16
) -> CompletionScores:
    """Score completions given their prompts, rendered and tokenised as TRL's SFTTrainer does it for training.

    A completion is an exact match when each of its tokens, given the right ones before it, is the most likely; this is
    the same as greedy decoding giving the completion.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with an end-of-sequence token, and for messages with a chat template.
        rows: as the trainer is given them: dicts of `prompt` and `completion`, each text or messages, or of
            `messages`, whose last answer is the completion.
        batch_size: rows per forward pass.

    Raises:
        FNSFTError: there are no rows, or one has no answer.
    """
    if not rows:
        raise FNSFTError("there are no rows to score; give at least one prompt with its completion")
    reader = RowReader(tokenizer)
    read = [reader.read(row, number) for number, row in enumerate(rows)]
    if without := [row.number for row in read if row.answer is None]:
        raise FNSFTError(f"row {without[0]} has no answer to score; give rows of prompt and completion, or messages")
    spans = [row.answer for row in read]
    sequences = [row.ids[:end] for row, (_, end) in zip(read, spans, strict=True)]
    scores = list(score_tokens(model, sequences, [start for start, _ in spans], batch_size=batch_size))
    return CompletionScores(
        exact_match=sum(bool(score.is_top1.all()) for score in scores) / len(scores),
        nll=sum(float(score.nll.sum()) for score in scores) / len(scores),
        rows=len(scores),
    )


@dataclass(frozen=True)
class RowScores:
    """Scores of a row as it is trained.

    Attributes:
        nll (`float`): negative log-likelihood of its tokens that count in the loss, in nats.
        tokens (`int`): how many these are, without a first token, which nothing precedes.
        answer_nll (`float`): the same of its last answer; 0 for text.
        is_exact (`bool`): whether the whole answer, its end included, is the greedy one; `False` for text.
    """

    nll: float
    tokens: int
    answer_nll: float = 0.0
    is_exact: bool = False


def score_rows(
    model: nn.Module,
    rows: Sequence[EvaluationRow],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    share: Share = ALONE,
    name: str = "rows",
) -> list[RowScores]:
    """Score rows as they are trained.

    Args:
        model: a causal language model.
        rows: as [`~fnsft_trl.evaluation.rows.RowReader`] reads them.
        max_length: text of more tokens is read in parts of so many, each by itself.
        batch_size: rows, or parts of text, in a forward pass.
        share: the part of this process.
        name: of the rows, beside the progress.
    """
    pieces = [piece for number, row in enumerate(rows) for piece in _pieces(number, row, max_length)]

    def work(numbers: list[int]) -> list[RowScores]:
        batch = [pieces[number] for number in numbers]
        scored = score_batch(model, [ids for _, ids, _ in batch], [first for _, _, first in batch])
        return [_row_scores(rows[row], first, score) for (row, _, first), score in zip(batch, scored, strict=True)]

    with evaluating(model):
        lengths = [len(ids) for _, ids, _ in pieces]
        found = share.in_batches(work, lengths, batch_size=batch_size, name=name)
    results: list[RowScores] = [RowScores(0.0, 0)] * len(rows)
    for (row, _, _), score in zip(pieces, found, strict=True):
        sums = results[row]
        results[row] = replace(score, nll=sums.nll + score.nll, tokens=sums.tokens + score.tokens)
    return results


def _pieces(number: int, row: EvaluationRow, max_length: int | None) -> Iterator[tuple[int, list[int], int]]:
    """What of a row is read at once: its number, token ids, and the first one to score."""
    if row.answer is not None or max_length is None or len(row.ids) <= max_length:
        yield number, row.ids, row.first
        return
    for start in range(0, len(row.ids), max_length):
        ids = row.ids[start : start + max_length]
        if len(ids) > 1:
            yield number, ids, 1


def scored_bytes(row: EvaluationRow, tokenizer, max_length: int | None = None) -> int:
    """How many bytes in UTF-8 the tokens of a text make up that [`score_rows`] scores: all but the first of each part.

    Args:
        row: of text.
        tokenizer: that made its tokens.
        max_length: as in [`score_rows`].

    Returns:
        At least 1.
    """

    def size(end: int) -> int:
        return len(tokenizer.decode(row.ids[:end], skip_special_tokens=True).encode())

    starts = range(0, len(row.ids), max_length or len(row.ids))
    return max(1, len(row.reference.encode()) - sum(size(start + 1) - size(start) for start in starts))


def _row_scores(row: EvaluationRow, first: int, score: TokenScores) -> RowScores:
    if row.answer is None:
        return RowScores(float(score.nll.sum(dtype=torch.float64)), len(score.nll))
    learnt = torch.tensor(row.learnt[first:])
    answer = slice(max(row.answer[0] - first, 0), row.answer[1] - first)
    return RowScores(
        nll=float(score.nll[learnt].sum(dtype=torch.float64)),
        tokens=int(learnt.sum()),
        answer_nll=float(score.nll[answer].sum(dtype=torch.float64)),
        is_exact=bool(score.is_top1[answer].all()),
    )
