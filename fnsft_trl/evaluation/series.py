"""RetentionSeries: one text, what the base model made of it, and what the trained one makes of it now."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..finite import NO_DIFFERENCE, check_finite
from .config import MEASURES, metric_name
from .kl import AdapterOff, StoredBase, chunks, reference_of, switches_kept
from .metrics import model_inputs
from .retention import RetentionText


_USUAL = 256  # tokens of a sequence for which a batch has its full size
_SAME = 1e-5  # nats per token between a model at its start and the same with its adapter off
_NEAR = 1e-3  # the same between two runs of one base, perhaps on other devices


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


def _sums(
    model: nn.Module,
    text: RetentionText,
    read: Callable[[dict, list[int], list[int]], tuple[torch.Tensor, list[torch.Tensor] | None]],
    *,
    batch_size: int,
    title: str | None,
) -> torch.Tensor:
    """What a model makes of every sequence, each process of a part of them; all get all.

    A batch holds the same sequences however many processes there are, so that its numbers are the same too.

    Args:
        model: left in the mode that it was in.
        read: inputs, numbers and lengths of a batch -> logits, and KLs at each position of each sequence, if any.
        title: of the progress bar; `None` for none.

    Returns:
        NLL and KL, summed over the tokens of each sequence, in their order, shape (sequences, 2), float64.
    """
    state = PartialState()
    every = batches([len(ids) for ids in text.sequences], batch_size)
    own = every[state.process_index :: state.num_processes]
    rounds = -(-len(every) // state.num_processes)
    # Sharded models wait for all processes in each forward pass: one without a batch takes any.
    idle = every[:1] * (rounds - len(own))
    was_training, found = model.training, {}
    device = input_device(model)
    model.eval()
    try:
        with torch.no_grad(), switches_kept(model):
            for numbers in tqdm([*own, *idle], title, leave=False, disable=title is None):
                sequences = [text.sequences[number] for number in numbers]
                inputs = model_inputs(sequences, device)
                logits, kls = read(inputs, numbers, [len(ids) for ids in sequences])
                for row, number in enumerate(numbers):
                    targets = inputs["input_ids"][row, 1 : len(sequences[row])]
                    kl = 0.0 if kls is None else float(kls[row].cpu().double().sum())
                    found[number] = (_nll(logits[row, : len(targets)], targets), kl)
    finally:
        model.train(was_training)
    found = _of_all_processes(found)
    return torch.tensor([found[number] for number in range(len(text.sequences))], dtype=torch.float64)


def _of_all_processes(found: dict[int, Any]) -> dict[int, Any]:
    """The entries of all processes together."""
    return dict(gather_object(list(found.items()))) if PartialState().num_processes > 1 else found


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
        exact (`bool`): keep what is needed for an exact KL where the model's own weights are trained, but not its
            head: in memory, so that a run with it cannot be resumed.

    Attributes:
        base (`float` or `None`): cross-entropy of the base model, in nats per token; `None` until it is known.
        kl_kind (`str` or `None`): `exact`, from the base itself, the adapter being switched off; or `top-k`, from its
            64 most probable tokens and a rest at each position, a lower bound.
        values (`dict[str, float]`): what was measured last, by measure.
        nll (`list[float]`): negative log-likelihood of each sequence when it was measured last, in nats.
        kl_sums (`list[float]`): KL of each sequence then, summed over its tokens, in nats.
    """

    def __init__(
        self,
        text: RetentionText,
        *,
        name: str = "",
        batch_size: int = 8,
        measures: Sequence[str] = MEASURES,
        exact: bool = False,
    ) -> None:
        self.text = text
        self.name = name
        self.batch_size = batch_size
        self.measures = tuple(measures)
        self.exact = exact
        self.base: float | None = None
        self.values: dict[str, float] = {}
        self.nll: list[float] = []
        self.kl_sums: list[float] = []
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

        Raises:
            FNSFTError: its cross-entropy is no number, or infinite: the rise from it could not be told.
        """
        self._reference = reference_of(model, exact=self.exact)
        self.base = self._keep(model, title)
        if isinstance(self._reference, AdapterOff):
            now, kl = self._compare(model, title)
            if not (abs(now - self.base) <= _SAME and abs(kl) <= _SAME):  # NaN is not the same
                self._reference = StoredBase()
                self.base = self._keep(model, title)
        check_finite(
            [self.base], f"the cross-entropy of the base on the retention text {self.name}".rstrip(), NO_DIFFERENCE
        )
        if isinstance(self._reference, StoredBase):
            self._reference.distributions = _of_all_processes(self._reference.distributions)
        self._model = ref(model)
        self.values = self._values(self.base, 0.0)

    def measure(self, model: nn.Module, *, title: str | None = None) -> dict[str, float]:
        """What a model makes of the text, beside its base: measure -> nats per token."""
        self.values = self._values(*self._compare(model, title))
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

    def resume(
        self,
        state: dict[str, Any],
        tensors: dict[str, torch.Tensor] | None,
        model: nn.Module,
        *,
        title: str | None = None,
    ) -> None:
        """Go on with the base of the run that is resumed.

        Args:
            state, tensors: of that run.
            model: the model of this one.
            title: of the progress bar; none by default.

        Raises:
            FNSFTError: it was measured on another text, or has another base; or its base cannot be had.
        """
        shown = f"the retention text {self.name!r}" if self.name else "the retention text"
        if state["sha256"] != self.text.sha256:
            raise FNSFTError(
                f"{shown} is not that of the run which is resumed ({self.text.tokens} tokens with the hash "
                f"{self.text.sha256[:16]}, there {state['tokens']} with {state['sha256'][:16]}), so their values "
                "cannot be compared; give the same text and retention_tokens, or start anew"
            )
        if state["kl"] == StoredBase.kind:
            if tensors is None:
                raise FNSFTError(
                    f"what the base predicts for {shown} is not in the checkpoint; resume from a checkpoint that is "
                    "complete, or start anew"
                )
            self._reference = StoredBase.from_tensors(tensors)
        else:
            self._reference = reference_of(model)
            if not isinstance(self._reference, AdapterOff):
                raise FNSFTError(
                    f"the base of {shown} was the model with its adapter off, or was kept in memory, and this run "
                    "trains weights of the model; resume with what it had, or start anew"
                )
            if not abs((found := self._keep(model, title)) - state["base"]) <= _NEAR:  # NaN is not near
                raise FNSFTError(
                    f"the base of this run has a cross-entropy of {found:.4f} on {shown}, that of the run which is "
                    f"resumed has {state['base']:.4f}: another base model, or in another precision; load the same"
                )
        self.base, self._model = state["base"], ref(model)

    def _keep(self, model: nn.Module, title: str | None) -> float:
        """The cross-entropy of the base, of which is kept what is needed to compare a model with it."""

        def read(inputs: dict, numbers: list[int], lengths: list[int]) -> tuple[torch.Tensor, None]:
            return self._reference.keep(model, inputs, numbers), None

        return self._means(model, read, title)[0]

    def _compare(self, model: nn.Module, title: str | None) -> list[float]:
        """Cross-entropy, and KL from the base."""
        return self._means(model, partial(self._reference.compare, model), title)

    def _means(self, model: nn.Module, read: Callable, title: str | None) -> list[float]:
        """Means over tokens; summed over sequences in their order, so that they are the same in any run."""
        sums = _sums(model, self.text, read, batch_size=self.batch_size, title=title)
        self.nll, self.kl_sums = sums.T.tolist()
        return (sums.sum(0) / self.text.tokens).tolist()

    def _values(self, cross_entropy: float, kl: float) -> dict[str, float]:
        values = {"cross_entropy": cross_entropy, "rise": cross_entropy - self.base, "kl": kl}
        return {measure: values[measure] for measure in self.measures}
