"""SinkCount: attention sinks beside position 0, told by their norms."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


_SINK = 10  # times the norm of other tokens: from here on, position 0 is an attention sink


@dataclass(frozen=True)
class SinkCount:
    """Attention sinks of a text beside position 0.

    Attributes:
        count (`int`): how many tokens have a norm of at least half of position 0's, where that stands out most.
        tokens (`int`): of how many.
        ids (`dict[int, int]`): token id -> how often it is one.
    """

    count: int
    tokens: int
    ids: dict[int, int]


class SinkCounter:
    """Norms of all tokens at all inputs, from which other attention sinks than position 0 are told."""

    def __init__(self, groups: Sequence[tuple[str, ...]]) -> None:
        self._groups = list(groups)
        self._now: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._first: list[torch.Tensor] = []  # of each batch, shape (inputs, sequences)
        self._others: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, group: tuple[str, ...], first: torch.Tensor, others: torch.Tensor) -> None:
        """Note the norms of the first tokens and of all others at one input, in the batch that is read."""
        self._now[group] = (first.cpu(), others.cpu())

    def end_batch(self, name: str, ids: torch.Tensor) -> None:
        """Note the token ids of a batch of a text, shape (others,)."""
        self._first.append(torch.stack([self._now[group][0] for group in self._groups]))
        norms = torch.stack([self._now[group][1] for group in self._groups])  # (inputs, others)
        self._others.setdefault(name, []).append((ids.cpu(), norms))

    def counts(self) -> dict[str, SinkCount]:
        """Of each text."""
        first = torch.cat(self._first, 1).median(1).values  # (inputs,)
        every = torch.cat([norms for of_text in self._others.values() for _, norms in of_text], 1)
        ratio = first / every.median(1).values.clamp_min(1e-30)
        place = int(ratio.argmax())
        found = {}
        for name, of_text in self._others.items():
            ids = torch.cat([ids for ids, _ in of_text])
            norms = torch.cat([norms[place] for _, norms in of_text])
            is_sink = (norms >= first[place] / 2) & (ratio[place] >= _SINK)
            values, counts = ids[is_sink].unique(return_counts=True)
            order = counts.argsort(descending=True, stable=True)
            by_id = dict(zip(values[order].tolist(), counts[order].tolist(), strict=True))
            found[name] = SinkCount(int(is_sink.sum()), len(ids), by_id)
        return found
