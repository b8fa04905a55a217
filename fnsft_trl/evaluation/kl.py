"""KL divergence of a trained model from its base, KL(base || trained), in nats for each token that is predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from ..errors import FNSFTError


TOP_K = 64  # tokens of each stored distribution

_CHUNK = 2**24  # float32 numbers of a distribution over the vocabulary that are held at once
_OF_ADAPTERS = ("lora_", "modules_to_save.", "trainable_tokens_")  # beside the prefix of the adapter's own method


def chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Pieces of a sequence whose distributions are few enough to be held in float32.

    Args:
        logits: shape (positions, vocabulary).
    """
    length = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(logits), length):
        yield slice(start, start + length)


def divergences(base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """KL(base || trained) at each position, in nats, computed in float32.

    Args:
        base: logits, shape (positions, vocabulary).
        trained: logits, of the same shape.

    Returns:
        Shape (positions,).
    """
    found = []
    for part in chunks(base):
        p = base[part].float().log_softmax(-1)  # (positions, vocabulary)
        q = trained[part].float().log_softmax(-1)
        found.append(_weighted(p, q).sum(-1))
    return torch.cat(found)


def _weighted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`exp(p) * (p - q)` of log-probabilities; 0 where the first probability is 0."""
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0)


@dataclass
class TopDistributions:
    """The most probable tokens of a model at each position of a sequence, and what is left for all others.

    Attributes:
        ids (`torch.Tensor`): token ids, shape (positions, k), int32.
        log_probs (`torch.Tensor`): their log-probabilities, shape (positions, k), float32.
        log_rest (`torch.Tensor`): log of the probability of all other tokens together, shape (positions,), float32.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int = TOP_K) -> "TopDistributions":
        """Those of logits, shape (positions, vocabulary)."""
        parts = []
        for part in chunks(logits):
            logs = logits[part].float().log_softmax(-1)
            top = logs.topk(min(k, logs.shape[-1]), dim=-1)
            parts.append((top.indices.int().cpu(), top.values.cpu(), _log_rest(logs, top.indices).cpu()))
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def divergences(self, trained: torch.Tensor) -> torch.Tensor:
        """KL(these || trained) over k + 1 outcomes, the k tokens and any other one: at most that of the whole.

        Args:
            trained: logits, shape (positions, vocabulary).

        Returns:
            Shape (positions,), in nats.
        """
        found = []
        for part in chunks(trained):
            logs = trained[part].float().log_softmax(-1)
            ids = self.ids[part].to(logs.device).long()
            p, p_rest = self.log_probs[part].to(logs.device), self.log_rest[part].to(logs.device)
            rest = _weighted(p_rest, _log_rest(logs, ids))
            found.append(_weighted(p, logs.gather(-1, ids)).sum(-1) + rest)
        return torch.cat(found)


def _log_rest(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the probability of all tokens but these, at each position; -inf where there is no other."""
    return logs.scatter(-1, ids, -torch.inf).logsumexp(-1)


class AdapterOff:
    """The base of a model with an adapter: the same model with the adapter switched off. Nothing is stored."""

    kind = "exact"

    def compare(
        self, model: nn.Module, inputs: dict, numbers: list[int], logits: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """KL at each position of the sequences of a batch, from one more forward pass.

        Args:
            model: the trained one.
            inputs: of its forward pass.
            numbers: of the sequences.
            logits: of the trained model for each of them, shape (positions, vocabulary).
        """
        with model.disable_adapter():
            base = model(**inputs).logits
        return [divergences(base[row, : len(found)], found) for row, found in enumerate(logits)]


class StoredBase:
    """The base of a model whose own weights are trained: what it predicted before, its most probable tokens.

    Args:
        distributions (`list[TopDistributions]`): one for each sequence of a text.
    """

    kind = "top-k"

    def __init__(self, distributions: list[TopDistributions]) -> None:
        self.distributions = distributions

    def compare(
        self, model: nn.Module, inputs: dict, numbers: list[int], logits: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """As [`AdapterOff.compare`], from what is stored: a lower bound."""
        pairs = zip(numbers, logits, strict=True)
        return [self.distributions[number].divergences(found) for number, found in pairs]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, for a file."""
        names = ("ids", "log_probs", "log_rest")
        found = {name: torch.cat([getattr(each, name) for each in self.distributions]) for name in names}
        return found | {"lengths": torch.tensor([len(each.ids) for each in self.distributions])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], sequences: list[list[int]]) -> "StoredBase":
        """What [`tensors`] gave.

        Raises:
            FNSFTError: it is of other sequences.
        """
        lengths = tensors["lengths"].tolist()
        if lengths != [len(ids) - 1 for ids in sequences]:
            raise FNSFTError("the stored distributions of the base are of another text; start the run anew")
        parts = zip(*(tensors[name].split(lengths) for name in ("ids", "log_probs", "log_rest")), strict=True)
        return cls([TopDistributions(*part) for part in parts])


def has_switch(model: nn.Module) -> bool:
    """Whether all that trains in a model belongs to an adapter that can be switched off."""
    if not isinstance(model, PeftModel) or any(c.is_prompt_learning for c in model.peft_config.values()):
        return False
    marks = (*_OF_ADAPTERS, model.base_model.prefix)
    return all(any(mark in name for mark in marks) for name, p in model.named_parameters() if p.requires_grad)


@contextmanager
def switches_kept(model: nn.Module) -> Iterator[None]:
    """Let what requires gradients be after a block what it was before it: switching an adapter on again sets it."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
