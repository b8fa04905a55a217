"""TrainerCallbacks: the frozen-neuron guard and retention during training. They work with any SFTTrainer."""

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback

from .errors import FNSFTError
from .evaluation.retention import RetentionText
from .masking import masks_off
from .neurons import find_neuron_sites
from .selection import NeuronMask


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
        for site in find_neuron_sites(self.model, kind=self.trainable.site):
            members = self.trainable.layers.get(site.layer, torch.zeros(site.width, dtype=torch.bool))
            frozen = (~members).nonzero().flatten()
            for part in site.layout.slices:
                layer = self.model.get_submodule(part.module_name)
                parameter = part.tensor(self.model)
                neurons = part.held(frozen if parameter.requires_grad else torch.arange(site.width))
                if parameter.is_floating_point() and len(neurons):  # a quantised weight has no rows of its own
                    rows = part.select(parameter.detach(), part.indices(neurons).to(parameter.device))
                    yield part.full_name, rows, neurons.repeat(len(part.offsets))
                    watched.add(id(parameter))
                if isinstance(layer, LoraLayer) and part.parameter == "weight" and len(frozen):
                    letter, factors = ("B", layer.lora_B) if part.side == "output" else ("A", layer.lora_A)
                    for adapter, factor in factors.items():
                        rows = factor.weight if letter == "B" else factor.weight.T
                        rows = rows[part.indices(frozen).to(rows.device)]
                        name = f"{part.module_name}.lora_{letter}.{adapter}"
                        yield name, rows, frozen.repeat(len(part.offsets))
        for name, parameter in self.model.named_parameters():
            # Quantised weights cannot train, and their kernels repack them between training and inference.
            if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in watched:
                flat = parameter.detach().flatten()
                padded = nn.functional.pad(flat, (0, -len(flat) % _BLOCK))
                yield name, padded.view(-1, _BLOCK), None


def _row_checksums(rows: torch.Tensor) -> torch.Tensor:
    """One 64-bit checksum per row: a random combination, modulo 2^64, of the bits of its entries."""
    rows = rows.detach().reshape(len(rows), -1)  # (rows, entries)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    random = torch.Generator().manual_seed(rows.shape[1])
    # Odd factors: a change of one entry always shows.
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=random).mul_(2).add_(1).to(rows.device)
    chunks = rows.contiguous().view(bits).split(4096)  # bounds the memory of the 64-bit copy
    return torch.cat([(chunk.to(torch.int64) * factors).sum(1) for chunk in chunks]).cpu()


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
