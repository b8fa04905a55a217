"""KL divergence of a trained model from its base, KL(base || trained), in nats for each token that is predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from ..errors import FNSFTError


TOP_K = 64  # tokens of each stored distribution

# Numbers of distributions over the vocabulary that are held in float32 at once: on a CPU what its cache holds,
# elsewhere enough to be busy.
_CHUNK, _CHUNK_ELSEWHERE = 2**18, 2**24
# Parts of the names of an adapter's parameters: whole weights of its own, and what may stand beside its method.
_OF_WHOLE = ("modules_to_save.", "trainable_tokens_")
_OF_ADAPTERS = ("lora_", *_OF_WHOLE)


def chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Pieces of a sequence whose distributions are few enough to be held in float32.

    Args:
        logits: shape (positions, vocabulary).
    """
    numbers = _CHUNK if logits.device.type == "cpu" else _CHUNK_ELSEWHERE
    length = max(1, numbers // logits.shape[-1])
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
        found.append(weighted(p, q).sum(-1))
    return torch.cat(found)


def weighted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`exp(p) * (p - q)` of log-probabilities; 0 where the first probability is 0."""
    found = (p - q).mul_(p.exp())
    return found.masked_fill_(p == -torch.inf, 0) if p.amin() == -torch.inf else found


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
            own = weighted(p, logs.gather(-1, ids)).sum(-1)
            has_rest = ids.shape[-1] < logs.shape[-1]  # nothing has no gradient
            found.append(own + weighted(p_rest, _log_rest(logs, ids)) if has_rest else own)
        return torch.cat(found)


def _log_rest(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the probability of all tokens but these, at each position; -inf where there is no other."""
    return logs.scatter(-1, ids, -torch.inf).logsumexp(-1)


class AdapterOff:
    """The base of a model with an adapter: the same model with its adapter switched off, in one more forward pass."""

    kind = "exact"

    def keep(self, model: nn.Module, inputs: dict, numbers: list[int]) -> torch.Tensor:
        """Read a batch with the base, and keep what `compare` needs.

        Args:
            model: with its adapter.
            inputs: of its forward pass, with `input_ids`, shape (sequences, positions).
            numbers: of the sequences in their text.

        Returns:
            The logits of the base.
        """
        with model.disable_adapter():
            return model(**inputs).logits

    def compare(
        self, model: nn.Module, inputs: dict, numbers: list[int], lengths: list[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read a batch with the trained model, and compare it with the base.

        Args:
            model, inputs, numbers: as for `keep`.
            lengths: of the sequences.

        Returns:
            Its logits; and for each sequence the KL at each position but the last, shape (length - 1,).
        """
        trained, base = self._both(model, inputs, numbers)
        rows = enumerate(lengths)
        return trained, [divergences(base[row, : length - 1], trained[row, : length - 1]) for row, length in rows]

    def _both(self, model: nn.Module, inputs: dict, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        trained = model(**inputs).logits
        return trained, self.keep(model, inputs, numbers)


class KeptStates(AdapterOff):
    """The same without the second pass: what the base gives to the head is kept, and the head reads it again.

    The head must be that of the base: nothing in it trains.
    """

    def __init__(self) -> None:
        self._states: dict[int, torch.Tensor] = {}  # of a sequence -> shape (positions, hidden), on the CPU

    def keep(self, model: nn.Module, inputs: dict, numbers: list[int]) -> torch.Tensor:
        """As the parent's."""

        def note(head: nn.Module, args: tuple) -> None:
            for number, states, present in zip(numbers, args[0], inputs["attention_mask"], strict=True):
                self._states[number] = states[: int(present.sum())].to("cpu", copy=True)

        with _before_head(model, note):
            return self._of_base(model, inputs, numbers)

    def _of_base(self, model: nn.Module, inputs: dict, numbers: list[int]) -> torch.Tensor:
        return super().keep(model, inputs, numbers)

    def _both(self, model: nn.Module, inputs: dict, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        kept = [self._states[number] for number in numbers]

        def join(head: nn.Module, args: tuple) -> tuple:
            states = args[0]  # (sequences, positions, hidden)
            base = torch.zeros_like(states)
            for row, of_base in enumerate(kept):
                base[row, : len(of_base)] = of_base.to(states.device)
            return (torch.cat([states, base]), *args[1:])

        with _before_head(model, join):
            logits = model(**inputs).logits
        if len(logits) != 2 * len(numbers):  # compiled without the hook
            return self._both_again(model, inputs, numbers)
        return logits[: len(numbers)], logits[len(numbers) :]

    def _both_again(self, model: nn.Module, inputs: dict, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._both(model, inputs, numbers)


class StatesBefore(KeptStates):
    """The same for a model whose own weights are trained, but for those of its head: what it gave to it before.

    They are kept in memory, for as many tokens as there are; a checkpoint does not hold them.
    """

    def _of_base(self, model: nn.Module, inputs: dict, numbers: list[int]) -> torch.Tensor:
        return model(**inputs).logits

    def _both_again(self, model: nn.Module, inputs: dict, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise FNSFTError(
            "the exact KL needs what the head of the model is given, and the model was compiled without the hook that "
            "notes it; measure before it is compiled, or without exact"
        )


class StoredBase:
    """The base of a model whose own weights are trained: the most probable tokens that it predicted before.

    Args:
        distributions (`dict[int, TopDistributions]`, *optional*): number of a sequence -> what was predicted in it.
    """

    kind = "top-k"

    def __init__(self, distributions: dict[int, TopDistributions] | None = None) -> None:
        self.distributions = dict(distributions or {})

    def keep(self, model: nn.Module, inputs: dict, numbers: list[int]) -> torch.Tensor:
        """As [`AdapterOff.keep`]; the model, as it is now, becomes the base."""
        logits = model(**inputs).logits
        for number, found, present in zip(numbers, logits, inputs["attention_mask"], strict=True):
            self.distributions[number] = TopDistributions.of(found[: int(present.sum()) - 1])
        return logits

    def compare(
        self, model: nn.Module, inputs: dict, numbers: list[int], lengths: list[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As [`AdapterOff.compare`], with what is stored: a lower bound."""
        trained = model(**inputs).logits
        rows = zip(numbers, trained, lengths, strict=True)
        return trained, [self.distributions[number].divergences(row[: length - 1]) for number, row, length in rows]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, for a file."""
        ordered = [each for _, each in sorted(self.distributions.items())]
        names = ("ids", "log_probs", "log_rest")
        found = {name: torch.cat([getattr(each, name) for each in ordered]) for name in names}
        return found | {"lengths": torch.tensor([len(each.ids) for each in ordered])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "StoredBase":
        """What [`tensors`] gave."""
        lengths = tensors["lengths"].tolist()
        parts = zip(*(tensors[name].split(lengths) for name in ("ids", "log_probs", "log_rest")), strict=True)
        return cls({number: TopDistributions(*part) for number, part in enumerate(parts)})


def reference_of(model: nn.Module, *, exact: bool = False) -> AdapterOff | StoredBase:
    """How the base of a model can be had while it is trained.

    Args:
        exact: keep what the base gives to its head, rather than its most probable tokens, where weights of the model
            itself are trained.

    Raises:
        FNSFTError: exact, and the head is trained.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = model.get_output_embeddings()
    is_kept = isinstance(head, nn.Module) and not any(p.requires_grad for p in head.parameters())
    if not has_switch(model):
        if exact and not is_kept:
            raise FNSFTError("the exact KL needs a head that is not trained; freeze it (tied embeddings too)")
        return StatesBefore() if exact else StoredBase()
    whole = [name for name in trained if any(mark in name for mark in _OF_WHOLE)]  # tied weights may be among them
    return KeptStates() if is_kept and not whole else AdapterOff()


@contextmanager
def _before_head(model: nn.Module, hook) -> Iterator[None]:
    """Call a hook before the model's head reads its input."""
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
