"""TrainerCallbacks: the frozen-neuron guard and retention during training. They work with any SFTTrainer."""

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback

from .errors import FNSFTError
from .evaluation.retention import RetentionText
from .neurons import find_neuron_sites
from .selection import NeuronMask


class FrozenNeuronMoved(RuntimeError):
    """A weight that should be frozen changed during training."""


class FrozenNeuronGuard(TrainerCallback):
    """Checks that nothing frozen has moved, at every save and at the end of training.

    It keeps one 64-bit checksum per row of every frozen parameter and per frozen neuron of those that train in part,
    taken when training begins, and compares them bit by bit.

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
        self._sums = dict(self._checksums())

    def on_save(self, args, state, control, **kwargs) -> None:
        self.check(step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.check(step=state.global_step)

    def check(self, *, step: int) -> None:
        """Compare all checksums with those taken when training began."""
        for name, sums in self._checksums():
            moved = (sums != self._sums[name]).nonzero().flatten()
            if len(moved):
                _, positions, what = self._frozen[name]
                index = int(moved[0]) if positions is None else int(positions[moved[0]])
                raise FrozenNeuronMoved(
                    f"{len(moved)} frozen {what}s of {name} changed by step {step}, the first is {what} {index}; the "
                    "weights of this run are not what its config says. Check for a custom optimizer or a callback "
                    "that writes to weights"
                )

    def _checksums(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._frozen = dict(self._frozen_parts())
        for name, (parameter, positions, _) in self._frozen.items():
            yield name, _row_checksums(parameter, positions)

    def _frozen_parts(self) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor | None, str]]]:
        """(name, (rows to watch first dimension first, their numbers or None for all, what a row is))."""
        trained_in_part: set[str] = set()
        for site in find_neuron_sites(self.model, kind=self.trainable.site):
            members = self.trainable.layers.get(site.layer, torch.zeros(site.width, dtype=torch.bool))
            frozen = (~members).nonzero().flatten()
            if len(frozen) == 0:
                continue
            for part in site.layout.slices:
                layer = self.model.get_submodule(part.module_name)
                positions = part.indices(frozen)
                if isinstance(layer, LoraLayer) and part.parameter == "weight":
                    factors = layer.lora_B if part.side == "output" else layer.lora_A
                    for adapter, factor in factors.items():
                        rows = factor.weight if part.side == "output" else factor.weight.T
                        factor_name = f"{part.module_name}.lora_{'B' if part.side == 'output' else 'A'}.{adapter}"
                        yield factor_name, (rows, positions, "neuron")
                parameter = getattr(layer, part.parameter)
                if parameter.requires_grad:
                    name = f"{part.module_name}.{part.parameter}"
                    trained_in_part.add(name)
                    yield name, (parameter.movedim(part.dim, 0), positions, "neuron")
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad and name not in trained_in_part:
                yield name, (parameter, None, "row")


def _row_checksums(parameter: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """One 64-bit checksum per row (or given row): a random combination, modulo 2^64, of the bits of its entries."""
    rows = parameter.detach()
    rows = rows.reshape(len(rows), -1) if rows.dim() else rows.reshape(1, 1)  # (rows, entries)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    random = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=random).mul_(2).add_(1).to(rows.device)
    numbers = torch.arange(len(rows)) if positions is None else positions
    sums = []
    for chunk in numbers.to(rows.device).split(4096):  # bounds the memory of the 64-bit copy
        sums.append((rows[chunk].contiguous().view(bits).to(torch.int64) * factors).sum(1))
    return torch.cat(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


class RetentionCallback(TrainerCallback):
    """Logs how much general ability is left, at each evaluation and at the end of training.

    Two numbers go to `trainer.log`: `retention/cross_entropy`, the mean token cross-entropy on the general text in
    nats, and `retention/rise`, its rise over the model before training. A mask that is on stays on.

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
        return self.text.cross_entropy(self.trainer.model, batch_size=self.batch_size)
