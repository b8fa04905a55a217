"""Scores of one batch under an intervention: what of each item a pass gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..evaluation.kl import chunks
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
    _predicted: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, items: Sequence[Item], ids: torch.Tensor, logits: torch.Tensor) -> "IntactBatch":
        """Of its logits, shape (items, positions, vocabulary)."""
        found = cls(items, ids)
        for row, item in enumerate(items):
            parts = []
            for part in chunks(found._rows(logits, row, item)):
                logs = found._rows(logits, row, item)[part].float().log_softmax(-1)
                p = logs.exp()
                parts.append((p, _dot(p, logs.clamp_min(-1e4))))
            found._predicted.append(parts)
        return found

    def _rows(self, logits: torch.Tensor, row: int, item: Item) -> torch.Tensor:
        """The logits that predict the scored tokens of an item, shape (tokens, vocabulary)."""
        return logits[row, item.scored[0] - 1 : item.scored[1] - 1]

    def scores(self, logits: torch.Tensor) -> ItemScores:
        """Of the logits of another pass over the batch.

        With p what the intact model predicts and z the logits: KL = sum p log p - sum p z + logsumexp z.
        """
        nll, kl, exact = [], [], []
        for row, item in enumerate(self.items):
            of_item = self._rows(logits, row, item)
            target = self.ids[row, item.scored[0] : item.scored[1]]
            sums = torch.zeros(2, dtype=torch.float64)
            met = True
            for part, (p, entropy) in zip(chunks(of_item), self._predicted[row], strict=True):
                z = of_item[part].float()
                normaliser = z.logsumexp(-1)
                at_target = z.gather(1, target[part, None])[:, 0]
                sums[0] += float((normaliser - at_target).cpu().double().sum())
                sums[1] += float((entropy - _dot(p, z) + normaliser).cpu().double().sum())
                if item.is_answer and met:
                    met = bool((z.argmax(-1) == target[part]).all())
            nll.append(float(sums[0]))
            kl.append(max(0.0, float(sums[1])))
            exact.append(int(item.is_answer and met))
        return ItemScores(nll, kl, exact)


def _dot(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Row by row, shape (tokens,)."""
    return torch.einsum("tv,tv->t", p, z)
