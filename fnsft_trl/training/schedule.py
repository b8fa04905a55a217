"""MaskScheduleCallback: other masks, and other trainable neurons, from one step of a run on."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..constraints import FrozenSlices, check_momenta, freeze_neurons
from ..errors import FNSFTError
from ..interventions.masking import MASK_MODES, MaskHandle
from ..neurons.mask import NeuronMask, check_mask
from ..neurons.sites import find_neuron_sites
from .reference import check_maskable, mask_trainer


@dataclass(frozen=True)
class MaskPhase:
    """What is masked, and what trains, from one step of a run to the start of the next phase.

    Args:
        start (`int` or `float`):
            Number of optimizer steps before the phase, or their share of the whole run, in [0, 1).
        mask_mode (`str`, *optional*):
            `"lesion"`, `"preserve"`, `"amplify"`, or `None` for no forward mask.
        mask ([`NeuronMask`], *optional*):
            The neurons of the forward mask. `None`: the selection of the trainer.
        trainable ([`NeuronMask`], *optional*):
            The neurons that may change in this phase; only in full fine-tuning. `None`: all that the trainer trains.
        mask_factor (`float`, *optional*):
            With `"amplify"`: what activations are multiplied by.
    """

    start: int | float
    mask_mode: str | None = None
    mask: NeuronMask | None = None
    trainable: NeuronMask | None = None
    mask_factor: float | None = None


class MaskScheduleCallback(TrainerCallback):
    """Switches the forward mask, and in full fine-tuning the trainable neurons, during training.

    Until the first phase, the run is as the trainer's config says. Neurons that a phase leaves out of `trainable` stay
    bit-identical through it. Their gradients are zero and do not count when gradients are clipped. Their momentum is
    cleared when the phase begins, and their values are put back after each step. Other weights that the run trains
    (attention, norms) go on training. A resumed run takes up the phase it was in.

    Args:
        trainer ([`FNSFTTrainer`], or one of [`with_networks`]):
            The trainer, with a `network_config`. Its trainable neurons hold those of all phases. Add the callback with
            `trainer.add_callback`, before training.
        phases (sequence of [`MaskPhase`]):
            The phases, by ascending start.

    Raises:
        FNSFTError: a phase that could not train what it names; when training begins, phases out of order; or after the
            first step, an optimizer whose momentum a later phase could not clear.
    """

    def __init__(self, trainer: Trainer, phases: Sequence[MaskPhase]) -> None:
        if not phases:
            raise FNSFTError("a MaskScheduleCallback without phases has no effect; give it some")
        if not isinstance(phases, Sequence) or not all(isinstance(phase, MaskPhase) for phase in phases):
            raise FNSFTError(f"the phases are {phases!r}; expected a list of MaskPhase")
        if getattr(trainer, "network_config", None) is None:
            raise FNSFTError("a MaskScheduleCallback needs a trainer with a network_config: see with_networks")
        if any(phase.mask_mode is not None for phase in phases):
            check_maskable(trainer.args)
        self.trainer = trainer
        self.phases = [replace(phase, start=_start(phase.start)) for phase in phases]
        # What each phase trains, over all layers.
        self._trainable = [self._check(phase) for phase in self.phases]
        self._own_handle = trainer.mask_handle
        self._handles = [self._handle(phase) for phase in self.phases]
        self._frozen = FrozenSlices()
        self._starts: list[int] = []
        self._current = -1
        self._checked = False

    def to_dict(self) -> list[dict]:
        """The phases as plain JSON values; checkpoints hold them, so that a run resumes with the same ones."""
        return [
            {
                "start": phase.start,
                "mask_mode": phase.mask_mode,
                "mask": None if phase.mask is None else phase.mask.sha256,
                **({} if phase.mask_factor is None else {"mask_factor": phase.mask_factor}),
                "trainable": trainable.sha256,
            }
            for phase, trainable in zip(self.phases, self._trainable, strict=True)
        ]

    def _check(self, phase: MaskPhase) -> NeuronMask:
        for name in ("mask", "trainable"):
            if getattr(phase, name) is not None:
                check_mask(getattr(phase, name), f"{name} of a phase")
        if phase.mask_mode not in (None, *MASK_MODES):
            raise FNSFTError(
                f"mask_mode {phase.mask_mode!r} of a phase is unknown; use {', '.join(MASK_MODES)} or None"
            )
        if (phase.mask_factor is None) == (phase.mask_mode == "amplify"):
            raise FNSFTError(
                f"a phase with mask_mode {phase.mask_mode!r} has mask_factor {phase.mask_factor}; amplify needs one, "
                "and only amplify takes one"
            )
        if phase.mask is not None and phase.mask_mode is None:
            raise FNSFTError("a phase with a mask but no mask_mode masks nothing; give a mask_mode")
        run, plan = self.trainer.trainable_neurons, self.trainer.plan
        widths = {layer: len(members) for layer, members in run.layers.items()}
        trainable = run if phase.trainable is None else phase.trainable.over(widths)
        if phase.trainable is not None and plan.method != "full":
            raise FNSFTError(
                f"a phase can switch the trainable neurons of full fine-tuning only, not of {plan.method}; drop "
                "trainable"
            )
        if (trainable & ~run).count:
            raise FNSFTError(
                f"a phase trains {(trainable & ~run).count} neurons that the trainer holds frozen throughout; let the "
                "trainer's selection hold the trainable neurons of all phases"
            )
        others_train = plan.method == "full" and plan.train != "selected" and self.trainer.network_config.train_other
        able = trainable
        if phase.mask_mode in ("lesion", "preserve"):
            silenced = self.trainer.neuron_mask if phase.mask is None else phase.mask
            silenced = silenced if phase.mask_mode == "lesion" else ~silenced
            able = trainable & ~silenced.over(widths)
        if able.count == 0 and not others_train:
            raise FNSFTError(
                f"the phase from {phase.start} on leaves nothing that could learn; let it train neurons that its mask "
                "does not silence"
            )
        return trainable

    def _handle(self, phase: MaskPhase) -> MaskHandle | None:
        if phase.mask_mode is None:
            return None
        mask = self.trainer.neuron_mask if phase.mask is None else phase.mask
        handle = mask_trainer(self.trainer, phase.mask_mode, mask, factor=phase.mask_factor)
        handle.disable()
        return handle

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        starts = [int(p.start * state.max_steps) if isinstance(p.start, float) else p.start for p in self.phases]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise FNSFTError(
                f"the phases start at steps {', '.join(map(str, starts))} of {state.max_steps}; each must start after "
                "the one before it"
            )
        if starts[-1] >= state.max_steps:
            raise FNSFTError(
                f"a phase starts at step {starts[-1]}, but the run ends at step {state.max_steps}; begin it before"
            )
        self._starts = starts
        self._enter(state.global_step, optimizer)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self._enter(state.global_step, optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._frozen.before_step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self._frozen.after_step()
        if not self._checked and optimizer.state:  # a first step may have been skipped, of gradients that overflow
            self._checked = True
            if any(phase.trainable is not None for phase in self.phases):
                model = self.trainer.model
                for site in find_neuron_sites(model, kind=self.trainer.trainable_neurons.site):
                    for part in site.layout.slices:
                        check_momenta(optimizer, part.tensor(model))

    def _enter(self, step: int, optimizer) -> None:
        number = bisect_right(self._starts, step) - 1
        if number == self._current:
            return
        frozen = FrozenSlices()
        if number >= 0 and self.phases[number].trainable is not None:
            freeze_neurons(frozen, self.trainer.model, self.trainer.trainable_neurons & ~self._trainable[number])
            if step == self._starts[number]:  # a run resumed later has cleared it already
                try:
                    frozen.clear_momentum(optimizer)
                except FNSFTError:
                    frozen.release()
                    raise
        self._frozen.release()
        self._frozen, self._current = frozen, number
        for handle in (self._own_handle, *self._handles):
            if handle is not None:
                handle.disable()
        self.trainer.mask_handle = self._own_handle if number < 0 else self._handles[number]
        if self.trainer.mask_handle is not None:
            self.trainer.mask_handle.enable()


def _start(start: int | float) -> int | float:
    """A step as an `int`, a fraction as a `float`, whatever type of number it is."""
    is_step = isinstance(start, Integral) and not isinstance(start, bool) and start >= 0
    if not is_step and not (isinstance(start, Real) and not isinstance(start, Integral) and 0 <= start < 1):
        raise FNSFTError(f"phase start {start!r} is no step (0, 1, 2...) and no fraction in [0, 1)")
    return int(start) if is_step else float(start)
