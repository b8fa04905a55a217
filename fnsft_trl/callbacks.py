"""TrainerCallbacks: the frozen-neuron guard, a schedule of masks, and retention during training.

The guard and retention work with any SFTTrainer.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .constraints import FrozenSlices, factor_slices, frozen_by_site, hold_neurons
from .errors import FNSFTError
from .evaluation.retention import RetentionText
from .mask import NeuronMask
from .masking import MaskHandle, lesion, masks_off, preserve


_BLOCK = 4096


class FrozenNeuronMoved(RuntimeError):
    """A weight that should be frozen changed during training."""


class FrozenNeuronGuard(TrainerCallback):
    """Checks that nothing frozen has moved, at every save and at the end of training.

    It keeps one 64-bit checksum for every frozen neuron of every weight, and for every block of 4,096 entries of all
    other frozen parameters, taken when training begins, and compares them bit by bit.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model as it is trained (`trainer.model`).
        trainable ([`NeuronMask`]):
            The neurons that may change.

    Raises:
        FrozenNeuronMoved: from `check`, naming the parameter and the neuron.
    """

    def __init__(self, model: nn.Module, trainable: NeuronMask) -> None:
        self.model = model
        self.trainable = trainable
        self._sums: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._sums = {name: _row_checksums(rows) for name, rows, _ in self._frozen()}

    def on_save(self, args, state, control, **kwargs) -> None:
        self.check(step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.check(step=state.global_step)

    def check(self, *, step: int) -> None:
        """Compare all checksums with those taken when training began."""
        for name, rows, neurons in self._frozen():
            moved = (_row_checksums(rows) != self._sums[name]).nonzero().flatten()
            if len(moved):
                first = int(moved[0])
                where = f"block {first} of {_BLOCK} entries" if neurons is None else f"neuron {int(neurons[first])}"
                raise FrozenNeuronMoved(
                    f"frozen weights of {name} changed by step {step}: {len(moved)} places, the first is {where}; the "
                    "weights of this run are not what its config says. Check for a custom optimizer or a callback "
                    "that writes to weights"
                )

    def _frozen(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """(name, frozen rows, the neuron of each row or `None` where rows are blocks of entries)."""
        watched: set[int] = set()
        for site, frozen in frozen_by_site(self.model, self.trainable):
            for part in site.layout.slices:
                parameter = part.tensor(self.model)
                neurons = part.held(frozen if parameter.requires_grad else torch.arange(site.width))
                if parameter.is_floating_point() and len(neurons):  # a quantised weight has no rows of its own
                    rows = part.select(_whole(parameter), part.indices(neurons).to(parameter.device))
                    yield part.full_name, rows, neurons.repeat(len(part.offsets))
                    watched.add(id(parameter))
            for adapter in self.model.peft_config if isinstance(self.model, PeftModel) else ():
                for found in factor_slices(self.model, site, adapter):
                    neurons = found.part.held(frozen)
                    if len(neurons):
                        letter = "B" if found.part.side == "output" else "A"
                        name = f"{found.part.full_name.removesuffix('.weight')}.lora_{letter}.{adapter}"
                        yield (
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
                yield name, flat.view(-1, _BLOCK), None


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


@dataclass(frozen=True)
class MaskPhase:
    """What is masked, and what trains, from one step of a run to the start of the next phase.

    Args:
        start (`int` or `float`):
            Number of optimizer steps before the phase, or their share of the whole run, in [0, 1).
        mask_mode (`str`, *optional*):
            `"lesion"`, `"preserve"`, or `None` for no forward mask.
        mask ([`NeuronMask`], *optional*):
            The neurons of the forward mask. `None`: the selection of the trainer.
        trainable ([`NeuronMask`], *optional*):
            The neurons that may change in this phase; only in full fine-tuning. `None`: all that the trainer trains.
    """

    start: int | float
    mask_mode: str | None = None
    mask: NeuronMask | None = None
    trainable: NeuronMask | None = None


class MaskScheduleCallback(TrainerCallback):
    """Switches the forward mask, and in full fine-tuning the trainable neurons, during training.

    Until the first phase, the run is as the trainer's config says. Neurons that a phase leaves out of `trainable` stay
    bit-identical through it: their gradients are zero and do not count when gradients are clipped, their momentum is
    cleared when the phase begins, and their values are put back after each step. Other weights that the run trains
    (attention, norms) go on training. A resumed run takes up the phase it was in.

    Args:
        trainer ([`FNSFTTrainer`]):
            The trainer, with a `network_config`. Its trainable neurons hold those of all phases. Add the callback with
            `trainer.add_callback`, before training, since a compiled model ignores hooks that come later.
        phases (sequence of [`MaskPhase`]):
            The phases, by ascending start.

    Raises:
        FNSFTError: a phase that could not train what it names; or, when training begins, phases out of order.
    """

    def __init__(self, trainer, phases: Sequence[MaskPhase]) -> None:
        if not phases:
            raise FNSFTError("a MaskScheduleCallback without phases has no effect; give it some")
        if trainer.network_config is None:
            raise FNSFTError("a MaskScheduleCallback needs a trainer with a network_config")
        self.trainer = trainer
        self.phases = list(phases)
        # What each phase trains, over all layers.
        self._trainable = [self._check(phase) for phase in self.phases]
        self._own_handle = trainer.mask_handle
        self._handles = [self._handle(phase) for phase in self.phases]
        self._held = FrozenSlices()
        self._starts: list[int] = []
        self._current = -1

    def to_dict(self) -> list[dict]:
        """The phases as plain JSON values; checkpoints hold them, so that a run resumes with the same ones."""
        return [
            {
                "start": phase.start,
                "mask_mode": phase.mask_mode,
                "mask": None if phase.mask is None else phase.mask.sha256,
                "trainable": trainable.sha256,
            }
            for phase, trainable in zip(self.phases, self._trainable, strict=True)
        ]

    def _check(self, phase: MaskPhase) -> NeuronMask:
        fraction = isinstance(phase.start, float)
        if phase.start < 0 or (fraction and phase.start >= 1):
            raise FNSFTError(f"phase start {phase.start!r} is no step (0, 1, 2...) and no fraction in [0, 1)")
        if phase.mask_mode not in (None, "lesion", "preserve"):
            raise FNSFTError(f"mask_mode {phase.mask_mode!r} of a phase is unknown; use lesion, preserve or None")
        if phase.mask is not None and phase.mask_mode is None:
            raise FNSFTError("a phase with a mask but no mask_mode masks nothing; give a mask_mode")
        run, plan = self.trainer.trainable_neurons, self.trainer.plan
        widths = {layer: len(members) for layer, members in run.layers.items()}
        trainable = run if phase.trainable is None else phase.trainable.over(widths)
        if phase.trainable is not None and plan.method != "full":
            raise FNSFTError(
                f"a phase can switch the trainable neurons of full fine-tuning only, not of {plan.method}"
            )
        if (trainable & ~run).count:
            raise FNSFTError(
                f"a phase trains {(trainable & ~run).count} neurons that the trainer holds frozen throughout; let the "
                "trainer's selection hold the trainable neurons of all phases"
            )
        others_train = plan.method == "full" and plan.train != "selected" and self.trainer.network_config.train_other
        able = trainable
        if phase.mask_mode is not None:
            silenced = self.trainer.neuron_mask if phase.mask is None else phase.mask
            silenced = silenced if phase.mask_mode == "lesion" else ~silenced
            able = trainable & ~silenced.over(widths)
        if able.count == 0 and not others_train:
            raise FNSFTError(f"the phase from {phase.start} on leaves nothing that could learn")
        return trainable

    def _handle(self, phase: MaskPhase) -> MaskHandle | None:
        if phase.mask_mode is None:
            return None
        intervene = lesion if phase.mask_mode == "lesion" else preserve
        handle = intervene(self.trainer.model, self.trainer.neuron_mask if phase.mask is None else phase.mask)
        handle.disable()
        return handle

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        starts = [int(p.start * state.max_steps) if isinstance(p.start, float) else p.start for p in self.phases]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise FNSFTError(
                f"the phases start at steps {', '.join(map(str, starts))} of {state.max_steps}; each must start after "
                "the one before it"
            )
        if starts[-1] >= state.max_steps:
            raise FNSFTError(f"a phase starts at step {starts[-1]}, but the run ends at step {state.max_steps}")
        self._starts = starts
        self._enter(state.global_step, optimizer)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._enter(state.global_step, optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._held.restore()

    def _enter(self, step: int, optimizer) -> None:
        number = bisect_right(self._starts, step) - 1
        if number == self._current:
            return
        self._current = number
        for handle in (self._own_handle, *self._handles):
            if handle is not None:
                handle.disable()
        current = self._own_handle if number < 0 else self._handles[number]
        self.trainer.mask_handle = current
        if current is not None:
            current.enable()
        self._held.release()
        if number >= 0 and self.phases[number].trainable is not None:
            frozen = self.trainer.trainable_neurons & ~self._trainable[number]
            hold_neurons(self._held, self.trainer.model, frozen)
            if step == self._starts[number]:  # a run resumed later has cleared it already
                self._held.clear_momentum(optimizer)


class RetentionCallback(TrainerCallback):
    """Logs how much general ability is left, at each evaluation and at the end of training.

    Two numbers go to `trainer.log`: `retention/cross_entropy`, the mean token cross-entropy on the general text in
    nats, and `retention/rise`, its rise over the model before training. Both are measured with forward masks off, for
    the trained weights carry none.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            The trainer whose model is measured. Add the callback with `trainer.add_callback`.
        texts (iterable of `str`):
            General text, disjoint from training and discovery.
        max_tokens (`int`, *optional*, defaults to `8192`):
            Number of tokens to score.
        batch_size (`int`, *optional*, defaults to `8`):
            Sequences per forward pass.
    """

    def __init__(self, trainer, texts: Iterable, *, max_tokens: int = 8192, batch_size: int = 8) -> None:
        self.trainer = trainer
        self.batch_size = batch_size
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self.text = RetentionText.from_texts(texts, tokenizer, max_tokens=max_tokens)
        self.base: float | None = None
        self._last_step = -1

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # A resumed run has the value of the untrained model in its history.
        logged = [entry["retention/base"] for entry in state.log_history if "retention/base" in entry]
        if logged:
            self.base = logged[0]
        elif state.global_step > 0:
            raise FNSFTError(
                "the checkpoint was written without a RetentionCallback, so the cross-entropy of the model before "
                "training is not known; start the run anew with the callback"
            )
        else:
            self.base = self._measure()
            self.trainer.log({"retention/base": self.base, "retention/tokens": self.text.tokens})

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self.base is not None and state.global_step != self._last_step:
            self._last_step = state.global_step
            value = self._measure()
            self.trainer.log({"retention/cross_entropy": value, "retention/rise": value - self.base})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.on_evaluate(args, state, control)

    def _measure(self) -> float:
        with masks_off(self.trainer.model):
            return self.text.cross_entropy(self.trainer.model, batch_size=self.batch_size)
