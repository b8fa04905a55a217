"""Scores of a model's answers, teacher-forced: no text is generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import FNSFTError


@dataclass
class TokenScores:
    """Scores of the scored tokens of one sequence.

    Attributes:
        nll (`torch.Tensor`): negative log-likelihood in nats, shape (scored tokens,).
        is_top1 (`torch.Tensor`): whether the token was the most likely one, shape (scored tokens,).
    """

    nll: torch.Tensor
    is_top1: torch.Tensor


@torch.no_grad()
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
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    results: list[TokenScores | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            length = max(len(sequences[i]) for i in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)  # (sequences, positions)
            present = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
                present[row, : len(sequences[i])] = 1
            ids, present = ids.to(device), present.to(device)
            logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits
            for row, i in enumerate(batch):
                first, last = first_scored[i], len(sequences[i])
                predicted = logits[row, first - 1 : last - 1].float()  # (scored tokens, vocabulary)
                target = ids[row, first:last]
                nll = nn.functional.cross_entropy(predicted, target, reduction="none")
                results[i] = TokenScores(nll.cpu(), (predicted.argmax(-1) == target).cpu())
    finally:
        model.train(was_training)
    yield from results


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


def score_completions(model: nn.Module, tokenizer, rows: Sequence[dict], *, batch_size: int = 16) -> CompletionScores:
    """Score completions given their prompts, tokenised as TRL's SFTTrainer does it for training.

    A completion is an exact match when each of its tokens, given the right ones before it, is the most likely; this is
    the same as greedy decoding giving the completion.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with an end-of-sequence token.
        rows: dicts of the strings `prompt` and `completion`.
        batch_size: rows per forward pass.
    """
    if not rows:
        raise FNSFTError("there are no rows to score; give at least one prompt with its completion")
    sequences, first = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        sequences.append(whole)
        first.append(_common_prefix(prompt, whole))
    scores = list(score_tokens(model, sequences, first, batch_size=batch_size))
    return CompletionScores(
        exact_match=sum(bool(score.is_top1.all()) for score in scores) / len(scores),
        nll=sum(float(score.nll.sum()) for score in scores) / len(scores),
        rows=len(scores),
    )


def _common_prefix(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens at the beginning are the same: the completion may change how the prompt's end is tokenised."""
    length = min(len(prompt), len(whole))
    return next((i for i in range(length) if prompt[i] != whole[i]), length)
