"""FrozenNeuronGuard: stops a run in which anything frozen has moved. It works with any Trainer."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..constraints import factor_slices, frozen_by_site
from ..errors import FNSFTError
from ..neurons.mask import NeuronMask


_BLOCK = 4096


class FrozenNeuronMoved(RuntimeError):
    """A weight that should be frozen changed during training."""


class FrozenNeuronGuard(TrainerCallback):
    """Checks that nothing frozen has moved, at every save and at the end of training.

    When training begins, it takes one 64-bit checksum for every frozen neuron of every weight, and for every block of
    4,096 entries of all other frozen parameters. Later it compares them bit by bit.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model as it is trained (`trainer.model`).
        trainable ([`NeuronMask`]):
            The neurons that may change.

    Attributes:
        expected (`str` or `None`): the `fingerprint` that the next training must begin with, that of the run which it
            resumes.
        neurons (`int`): how many frozen neurons are checked: those of which any weight is no quantised one.
        others (`int`): how many other frozen parameters are checked (attention, norms, embeddings).
        checked (`int` or `None`): the step of the last check, in which nothing had moved.

    Raises:
        FrozenNeuronMoved: from `check`, naming the parameter and the neuron.
        FNSFTError: when training begins, with other frozen weights than expected.
    """

    def __init__(self, model: nn.Module, trainable: NeuronMask) -> None:
        self.model = model
        self.trainable = trainable
        self.expected: str | None = None
        self.neurons = self.others = 0
        self.checked: int | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._has_begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sums, self.checked, self.others, self._has_begun = {}, None, 0, True
        of_layers: dict[int, list[torch.Tensor]] = {}
        for layer, name, rows, neurons in self._frozen():
            self._sums[name] = _row_checksums(rows)
            if neurons is None:
                self.others += 1
            else:
                of_layers.setdefault(layer, []).append(neurons)
        frozen = {site.layer: neurons for site, neurons in frozen_by_site(self.model, self.trainable)}
        self.neurons = sum(
            int(torch.isin(frozen[layer], torch.cat(found)).sum()) for layer, found in of_layers.items()
        )
        if self.expected not in (None, self.fingerprint):
            raise FNSFTError(
                "the frozen weights are not those of the run that is resumed: another base model, or another "
                "precision; load the model that the checkpoint was trained on, or start anew (drop "
                "resume_from_checkpoint)"
            )
        self.expected = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of everything frozen, as it was when training began."""
        digest = hashlib.sha256()
        for name, sums in sorted(self._sums.items()):
            digest.update(name.encode() + sums.numpy().tobytes())
        return digest.hexdigest()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.check(step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.check(step=state.global_step)

    def check(self, *, step: int) -> None:
        """Compare all checksums with those taken when training began.

        Raises:
            FrozenNeuronMoved: naming the parameter and the neuron.
            FNSFTError: no training has begun.
        """
        if not self._has_begun:
            raise FNSFTError(
                "the guard compares frozen weights with what they were when a training began, and none has begun; "
                "call check after train, or on_train_begin first"
            )
        for _, name, rows, neurons in self._frozen():
            moved = (_row_checksums(rows) != self._sums[name]).nonzero().flatten()
            if len(moved):
                first = int(moved[0])
                where = f"block {first} of {_BLOCK} entries" if neurons is None else f"neuron {int(neurons[first])}"
                raise FrozenNeuronMoved(
                    f"frozen weights of {name} changed by step {step}: {len(moved)} places, the first is {where}; the "
                    "weights of this run are not what its config says. Check for a custom optimizer or a callback "
                    "that writes to weights"
                )
        self.checked = step

    def _frozen(self) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor | None]]:
        """(layer, name, frozen rows, the neuron of each row or `None` where rows are blocks of entries)."""
        watched: set[int] = set()
        for site, frozen in frozen_by_site(self.model, self.trainable):
            for part in site.layout.slices:
                parameter = part.tensor(self.model)
                neurons = part.among(frozen if parameter.requires_grad else torch.arange(site.width))
                if parameter.is_floating_point() and len(neurons):  # a quantised weight has no rows of its own
                    rows = part.select(_whole(parameter), part.indices(neurons).to(parameter.device))
                    yield site.layer, part.full_name, rows, neurons.repeat(len(part.offsets))
                    watched.add(id(parameter))
            for adapter in self.model.peft_config if isinstance(self.model, PeftModel) else ():
                for found in factor_slices(self.model, site, adapter):
                    neurons = found.part.among(frozen)
                    if len(neurons):
                        letter = "B" if found.part.side == "output" else "A"
                        name = f"{found.part.full_name.removesuffix('.weight')}.lora_{letter}.{adapter}"
                        yield (
                            site.layer,
                            name,
                            found.rows(neurons, _whole(found.factor.weight)),
                            neurons.repeat(len(found.part.offsets)),
                        )
        for name, parameter in self.model.named_parameters():
            # Quantised weights cannot train, and their kernels repack them between training and inference.
            if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in watched:
                flat = _whole(parameter).flatten()
                if len(flat) % _BLOCK:
                    flat = nn.functional.pad(flat, (0, -len(flat) % _BLOCK))
                yield -1, name, flat.view(-1, _BLOCK), None


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values; gathered from all processes where it is sharded."""
    values = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def _row_checksums(rows: torch.Tensor) -> torch.Tensor:
    """One 64-bit checksum per row: a random combination, modulo 2^64, of its bits, in words of 64."""
    rows = rows.detach().reshape(len(rows), -1)  # (rows, entries)
    per_word = 8 // rows.element_size()
    if rows.shape[1] % per_word or rows.storage_offset() % per_word:
        rows = nn.functional.pad(rows, (0, -rows.shape[1] % per_word)).clone()
    random = torch.Generator().manual_seed(rows.shape[1])
    words = rows.shape[1] // per_word
    # Odd factors: a change of one word always shows.
    factors = torch.randint(-(2**62), 2**62, (words,), generator=random).mul_(2).add_(1).to(rows.device)
    chunks = rows.contiguous().view(torch.int64).split(4096)  # bounds the memory of the products
    return torch.cat([(chunk * factors).sum(1) for chunk in chunks]).cpu()
