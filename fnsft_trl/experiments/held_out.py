"""HeldOut: rows that were held out of the training, scored token by token as they are trained."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn

from ..errors import FNSFTError
from ..evaluation.metrics import score_tokens


_IGNORED = -100  # the label of a token that is not learnt


@dataclass
class RowScores:
    """How well a model predicts what is learnt of each row.

    Attributes:
        nll (`list[float]`): negative log-likelihood of the answer of each row, in nats.
        tokens (`list[int]`): the number of its tokens, the end of the sequence included.
        exact (`list[bool]`): whether each of them, given the right ones before it, is the most likely one: the greedy
            answer is the whole answer.
    """

    nll: list[float]
    tokens: list[int]
    exact: list[bool]

    def summary(self) -> dict[str, float]:
        """Mean `nll` of an answer in nats, `perplexity` of its tokens, and the share of `exact_match`."""
        count = len(self.nll)
        return {
            "nll": math.fsum(self.nll) / count,
            "perplexity": math.exp(min(700.0, math.fsum(self.nll) / sum(self.tokens))),
            "exact_match": sum(self.exact) / count,
        }


@dataclass
class HeldOut:
    """Rows as a trainer has prepared them to evaluate on: in its prompt format, cut where it cuts.

    Attributes:
        sequences (`list[list[int]]`): token ids.
        scored (`list[list[int]]`): the places of the tokens that are learnt, in each sequence.
        left_out (`int`): rows of which no token is learnt.
        sha256 (`str`): hash of token ids and places.
    """

    sequences: list[list[int]]
    scored: list[list[int]]
    left_out: int
    sha256: str

    @classmethod
    def of(cls, dataset: Any) -> "HeldOut":
        """Take the rows of a prepared dataset, with `input_ids` and perhaps `labels`.

        Raises:
            FNSFTError: there are none, they are not tokenised, or they teach nothing.
        """
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
            raise FNSFTError(
                "an arm needs an evaluation dataset of rows that its trainer has tokenised (a datasets.Dataset)"
            )
        found = cls([], [], 0, "")
        digest = hashlib.sha256()
        for row in dataset:
            ids, labels = row["input_ids"], row.get("labels") or row["input_ids"]
            places = [place for place, label in enumerate(labels) if label != _IGNORED and place > 0]
            if not places:
                found.left_out += 1
                continue
            found.sequences.append(ids)
            found.scored.append(places)
            digest.update(repr((ids, places)).encode())
        if not found.sequences:
            raise FNSFTError(f"none of the {len(dataset)} rows to score holds a token that is learnt; give others")
        found.sha256 = digest.hexdigest()
        return found

    def score(self, model: nn.Module, *, batch_size: int = 8) -> RowScores:
        """Score the rows under a model, which is left in the mode that it was in.

        Args:
            model: a causal language model.
            batch_size: rows per forward pass.
        """
        firsts = [places[0] for places in self.scored]
        scores = RowScores([], [], [])
        found = score_tokens(model, self.sequences, firsts, batch_size=batch_size)
        for tokens, places in zip(found, self.scored, strict=True):
            own = _after(places)
            scores.nll.append(float(tokens.nll[own].double().sum()))
            scores.tokens.append(len(places))
            scores.exact.append(bool(tokens.is_top1[own].all()))
        return scores


def _after(places: Sequence[int]) -> list[int]:
    """Places, counted from the first of them."""
    return [place - places[0] for place in places]
