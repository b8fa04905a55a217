"""RetentionSeries: one text, what the base model made of it, and what the trained one makes of it now."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..errors import FNSFTError
from .config import MEASURES, metric_name
from .kl import AdapterOff, StoredBase, TopDistributions, chunks, has_switch, switches_kept
from .retention import RetentionText


_USUAL = 256  # tokens of a sequence for which a batch has its full size
_SAME = 1e-5  # nats per token between a model at its start and the same with its adapter off


@dataclass
class _Scored:
    """What a model makes of one sequence: sums over its tokens, in nats."""

    nll: float
    kl: float | None = None
    top: TopDistributions | None = None


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The numbers of sequences, those of similar length together.

    Args:
        lengths: of the sequences.
        batch_size: the most of them in a batch, as long as they have 256 tokens; fewer of longer ones.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        most = min(batch_size, max(1, batch_size * _USUAL // lengths[number]))
        if found and len(found[-1]) < most:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _scores(
    model: nn.Module,
    text: RetentionText,
    *,
    batch_size: int,
    base: AdapterOff | StoredBase | None = None,
    keeps_top: bool = False,
    title: str | None = None,
) -> list[_Scored]:
    """Score every sequence, each process a part of them; all get all, in the order of the text.

    A batch holds the same sequences however many processes there are, so that its numbers are the same too.

    Args:
        model: left in the mode that it was in.
        base: to compare with.
        keeps_top: whether the most probable tokens are wanted.
        title: of the progress bar; none by default.
    """
    state = PartialState()
    every = batches([len(ids) for ids in text.sequences], batch_size)
    own = every[state.process_index :: state.num_processes]
    rounds = -(-len(every) // state.num_processes)
    # Sharded models wait for all processes in each forward pass: one without a batch takes any.
    idle = every[:1] * (rounds - len(own))
    was_training, found = model.training, {}
    model.eval()
    try:
        with torch.no_grad(), switches_kept(model):
            for numbers in tqdm([*own, *idle], title, leave=False, disable=title is None):
                scored = _score_batch(model, text.sequences, numbers, base, keeps_top)
                found |= dict(zip(numbers, scored, strict=True))
    finally:
        model.train(was_training)
    if state.num_processes > 1:
        mine = {number: found[number] for numbers in own for number in numbers}
        found = dict(gather_object(list(mine.items())))
    return [found[number] for number in range(len(text.sequences))]


def _score_batch(
    model: nn.Module, sequences: list[list[int]], numbers: list[int], base, keeps_top: bool
) -> Iterator[_Scored]:
    device = next(model.parameters()).device
    length = max(len(sequences[number]) for number in numbers)
    ids = torch.zeros(len(numbers), length, dtype=torch.long)  # (sequences, positions)
    present = torch.zeros_like(ids)
    for row, number in enumerate(numbers):
        ids[row, : len(sequences[number])] = torch.tensor(sequences[number])
        present[row, : len(sequences[number])] = 1
    inputs = {"input_ids": ids.to(device), "attention_mask": present.to(device), "use_cache": False}
    logits = model(**inputs).logits
    of_each = [logits[row, : len(sequences[number]) - 1] for row, number in enumerate(numbers)]
    kls = base.compare(model, inputs, numbers, of_each) if base is not None else [None] * len(numbers)
    for row, (predicted, kl) in enumerate(zip(of_each, kls, strict=True)):
        targets = inputs["input_ids"][row, 1 : len(predicted) + 1]
        yield _Scored(
            nll=_nll(predicted, targets),
            kl=None if kl is None else float(kl.cpu().double().sum()),
            top=TopDistributions.of(predicted) if keeps_top else None,
        )


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Negative log-likelihood of tokens, summed; in float32, a few positions at a time, summed in float64."""
    parts = [
        nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="none").cpu().double()
        for part in chunks(logits)
    ]
    return float(torch.cat(parts).sum())


class RetentionSeries:
    """How much of one text a model still predicts as its base did.

    Args:
        text ([`RetentionText`]): the text.
        name (`str`): of the series; empty for one whose values have no name in theirs.
        batch_size (`int`): sequences of up to 256 tokens in a forward pass; fewer of longer ones.
        measures (`tuple[str, ...]`): of `MEASURES`, those that are given out.

    Attributes:
        base (`float` or `None`): cross-entropy of the base model, in nats per token; `None` until it is known.
        kl_kind (`str` or `None`): `exact`, from the base itself, the adapter being switched off; or `top-k`, from its
            64 most probable tokens and a rest at each position, a lower bound.
        values (`dict[str, float]`): what was measured last, by measure.
        nll (`list[float]`): negative log-likelihood of each sequence when it was measured last, in nats.
    """

    def __init__(
        self, text: RetentionText, *, name: str = "", batch_size: int = 8, measures: Sequence[str] = MEASURES
    ) -> None:
        self.text = text
        self.name = name
        self.batch_size = batch_size
        self.measures = tuple(measures)
        self.base: float | None = None
        self.values: dict[str, float] = {}
        self.nll: list[float] = []
        self._reference: AdapterOff | StoredBase | None = None
        self._model: ref[nn.Module] | None = None

    def is_of(self, model: nn.Module) -> bool:
        """Whether the base is what this very model was before."""
        return self._model is not None and self._model() is model

    @property
    def kl_kind(self) -> str | None:
        """How the KL divergence is had: `exact` or `top-k`."""
        return self._reference and self._reference.kind

    def begin(self, model: nn.Module, *, title: str | None = None) -> None:
        """Take a model as the base: as it is now.

        Where an adapter trains and changes nothing yet, the base is had at any time by switching it off. All else
        (full fine-tuning, an adapter that has been trained before, weights of the base that train beside it) is
        compared with what is stored now.

        Args:
            model: with its forward masks off.
            title: of the progress bar; none by default.
        """
        reference = AdapterOff() if has_switch(model) else None
        scored = self._scores(model, reference, title)
        if reference is not None and abs(self._mean(each.kl for each in scored)) > _SAME:
            reference, scored = None, self._scores(model, None, title)
        self._reference = reference or StoredBase([each.top for each in scored])
        self._model = ref(model)
        self.base = self._mean(each.nll for each in scored)
        self.values = self._values(self.base, 0.0)

    def measure(self, model: nn.Module, *, title: str | None = None) -> dict[str, float]:
        """What a model makes of the text, beside its base: measure -> nats per token."""
        scored = self._scores(model, self._reference, title)
        self.values = self._values(self._mean(each.nll for each in scored), self._mean(each.kl for each in scored))
        return self.values

    def named(self) -> dict[str, float]:
        """What was measured last, by its name in a log."""
        return {metric_name(self.name, measure): value for measure, value in self.values.items()}

    def state(self) -> dict[str, Any]:
        """What another run must know to go on with this series, as JSON values."""
        return {"sha256": self.text.sha256, "tokens": self.text.tokens, "base": self.base, "kl": self.kl_kind}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The rest of it, where the base cannot be had again: what it predicted."""
        return self._reference.tensors() if isinstance(self._reference, StoredBase) else {}

    def resume(self, state: dict[str, Any], tensors: dict[str, torch.Tensor] | None, model: nn.Module) -> None:
        """Go on with the base of the run that is resumed.

        Args:
            state, tensors: of that run.
            model: the model of this one.

        Raises:
            FNSFTError: it was measured on another text; or its base cannot be had.
        """
        shown = f"the retention text {self.name!r}" if self.name else "the retention text"
        if state["sha256"] != self.text.sha256:
            raise FNSFTError(
                f"{shown} is not that of the run which is resumed ({self.text.tokens} tokens with the hash "
                f"{self.text.sha256[:16]}, there {state['tokens']} with {state['sha256'][:16]}), so their values "
                "cannot be compared; give the same text and retention_tokens, or start anew"
            )
        if state["kl"] == AdapterOff.kind:
            if not has_switch(model):
                raise FNSFTError(
                    f"the base of {shown} was the model with its adapter off, and this run trains weights of the "
                    "model; resume with what it had, or start anew"
                )
            self._reference = AdapterOff()
        else:
            if tensors is None:
                raise FNSFTError(
                    f"what the base predicts for {shown} is not in the checkpoint; resume from a checkpoint that is "
                    "complete, or start anew"
                )
            self._reference = StoredBase.from_tensors(tensors, self.text.sequences)
        self.base, self._model = state["base"], ref(model)

    def _scores(self, model: nn.Module, base: AdapterOff | StoredBase | None, title: str | None) -> list[_Scored]:
        options = {"base": base, "keeps_top": base is None, "batch_size": self.batch_size, "title": title}
        scored = _scores(model, self.text, **options)
        self.nll = [each.nll for each in scored]
        return scored

    def _mean(self, sums: Iterable[float]) -> float:
        """The mean over tokens of sums over sequences; in their order, so that it is the same in any run."""
        return float(torch.tensor(list(sums), dtype=torch.float64).sum()) / self.text.tokens

    def _values(self, cross_entropy: float, kl: float) -> dict[str, float]:
        values = {"cross_entropy": cross_entropy, "rise": cross_entropy - self.base, "kl": kl}
        return {measure: values[measure] for measure in self.measures}
