"""Scores of one batch under an intervention: what of each item a pass gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..evaluation.kl import chunks, weighted
from .data import Item


@dataclass(frozen=True)
class ItemScores:
    """What one pass gives of the items of a batch, one value for each.

    Attributes:
        nll (`list[float]`): negative log-likelihood of the scored tokens, summed, in nats.
        kl (`list[float]`): KL of the intact model from this one at them, summed, in nats.
        exact (`list[int]`): whether all of them are the most likely ones.
    """

    nll: list[float]
    kl: list[float]
    exact: list[int]


@dataclass
class IntactBatch:
    """What the intact model predicts for a batch, which interventions are compared with.

    Attributes:
        items (`Sequence[Item]`): of the batch.
        ids (`torch.Tensor`): token ids, shape (items, positions).
    """

    items: Sequence[Item]
    ids: torch.Tensor
    _predicted: list[list[torch.Tensor]] = field(default_factory=list, repr=False)  # log-probabilities, in pieces

    @classmethod
    def of(cls, items: Sequence[Item], ids: torch.Tensor, logits: torch.Tensor) -> "IntactBatch":
        """Of its logits, shape (items, positions, vocabulary)."""
        found = cls(items, ids)
        for row, item in enumerate(items):
            of_item = found._rows(logits, row, item)
            found._predicted.append([_log_probs(of_item[part]) for part in chunks(of_item)])
        return found

    def _rows(self, logits: torch.Tensor, row: int, item: Item) -> torch.Tensor:
        """The logits that predict the scored tokens of an item, shape (tokens, vocabulary)."""
        return logits[row, item.scored[0] - 1 : item.scored[1] - 1]

    def scores(self, logits: torch.Tensor) -> ItemScores:
        """Of the logits of another pass over the batch.

        The divergence is summed over differences of log-probabilities. As a difference of sums, of p log p and of
        p log q, it would be off by a thousandth of a nat a token in float32, more than a small lesion does.
        """
        nll, kl, exact = [], [], []
        for row, item in enumerate(self.items):
            of_item = self._rows(logits, row, item)
            target = self.ids[row, item.scored[0] : item.scored[1]]
            sums = torch.zeros(2, dtype=torch.float64)
            met = True
            for part, p in zip(chunks(of_item), self._predicted[row], strict=True):
                q = _log_probs(of_item[part])
                sums[0] -= float(q.gather(1, target[part, None]).cpu().double().sum())
                sums[1] += float(weighted(p, q).sum(-1).cpu().double().sum())
                if item.is_answer and met:
                    met = bool((of_item[part].argmax(-1) == target[part]).all())
            nll.append(float(sums[0]))
            kl.append(float(sums[1].clamp_min(0)))  # which keeps NaN
            exact.append(int(item.is_answer and met))
        return ItemScores(nll, kl, exact)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Of the last dimension, in float32; on a CPU a digit more exact than `log_softmax`."""
    z = logits.float()
    return z - z.logsumexp(-1, keepdim=True)
