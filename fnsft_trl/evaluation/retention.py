"""Retention: how much general ability is left, as token cross-entropy on general text."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..data.sequences import token_sequences
from ..errors import FNSFTError
from .bootstrap import DRAWS, Interval
from .measures import Measure
from .metrics import score_tokens


@dataclass
class RetentionText:
    """General text, tokenised once.

    Attributes:
        sequences (`list[list[int]]`): token ids.
        tokens (`int`): number of tokens that are scored: all but the first of each sequence.
        sha256 (`str`): hash of the token ids.
    """

    sequences: list[list[int]]
    tokens: int
    sha256: str

    @classmethod
    def from_texts(
        cls, texts: Iterable, tokenizer, *, max_tokens: int = 8192, max_length: int = 256, name: str = "the text"
    ) -> "RetentionText":
        """Tokenise texts until `max_tokens` tokens are there to be scored.

        Args:
            texts: as [`~fnsft_trl.data.sequences.text_token_ids`] takes them.
            tokenizer: the model's tokenizer.
            max_tokens: number of tokens to score.
            max_length: tokens of a sequence; longer texts are cut into several.
            name: of the texts, for messages.

        Raises:
            FNSFTError: the texts hold no two tokens in a row.
        """
        sequences, tokens = [], 0
        for sequence in token_sequences(texts, tokenizer, max_length=max_length, name=name):
            ids = sequence.ids[: max_tokens - tokens + 1]
            if len(ids) < 2:
                continue
            sequences.append(ids)
            tokens += len(ids) - 1
            if tokens >= max_tokens:
                break
        if not sequences:
            raise FNSFTError(f"{name} for retention holds no tokens to score; give some sentences of text")
        return cls.of_sequences(sequences)

    @classmethod
    def of_sequences(cls, sequences: list[list[int]]) -> "RetentionText":
        """Take token ids as they are; each sequence holds at least two."""
        digest = hashlib.sha256()
        for ids in sequences:
            digest.update(torch.tensor(ids).numpy().tobytes())
        return cls(sequences, sum(len(ids) - 1 for ids in sequences), digest.hexdigest())

    def sequence_nll(self, model: nn.Module, *, batch_size: int = 8) -> torch.Tensor:
        """Negative log-likelihood of each sequence under a model, in nats, shape (sequences,), float64."""
        scores = score_tokens(model, self.sequences, [1] * len(self.sequences), batch_size=batch_size)
        return torch.stack([score.nll.sum(dtype=torch.float64) for score in scores])

    def cross_entropy(self, model: nn.Module, *, batch_size: int = 8) -> float:
        """Mean cross-entropy of the scored tokens under a model, in nats."""
        return float(self.sequence_nll(model, batch_size=batch_size).sum()) / self.tokens

    def rise(self, before: torch.Tensor, after: torch.Tensor, *, draws: int = DRAWS) -> Interval:
        """Rise of the cross-entropy between two models, with its 95% interval over texts.

        A paired bootstrap over sequences: it says how much the choice of texts matters, not how much the seed of a
        training run does. Sequences that were cut from one long text count as texts of their own, so the interval is
        too narrow where these are few.

        Args:
            before, after: of [`sequence_nll`], shape (sequences,).
            draws: bootstrap samples.

        Returns:
            The rise, and the lower and upper end of the interval, in nats per token.
        """
        tokens = [len(ids) - 1 for ids in self.sequences]
        sums = (before.tolist(), after.tolist())
        base, trained = (Measure.of_sums(nll, tokens, range(len(tokens)), rises=False) for nll in sums)
        return trained.minus(base, draws=draws)
