"""Retention: how much general ability is left, as token cross-entropy on general text."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..activations import token_sequences
from ..errors import FNSFTError
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
        cls, texts: Iterable, tokenizer, *, max_tokens: int = 8192, max_length: int = 256
    ) -> "RetentionText":
        """Tokenise texts until `max_tokens` tokens are there to be scored.

        Raises:
            FNSFTError: the texts hold no two tokens in a row.
        """
        sequences, tokens, digest = [], 0, hashlib.sha256()
        for sequence in token_sequences(texts, tokenizer, max_length=max_length):
            ids = sequence.ids[: max_tokens - tokens + 1]
            if len(ids) < 2:
                continue
            sequences.append(ids)
            tokens += len(ids) - 1
            digest.update(torch.tensor(ids).numpy().tobytes())
            if tokens >= max_tokens:
                break
        if not sequences:
            raise FNSFTError("the general text for retention holds no tokens to score; give some sentences of text")
        return cls(sequences, tokens, digest.hexdigest())

    def cross_entropy(self, model: nn.Module, *, batch_size: int = 8) -> float:
        """Mean cross-entropy of the scored tokens under a model, in nats."""
        first = [1] * len(self.sequences)
        scores = score_tokens(model, self.sequences, first, batch_size=batch_size)
        return sum(float(score.nll.sum(dtype=torch.float64)) for score in scores) / self.tokens
