"""KLToBase: the divergence of the base to the trained model on general text, as a part of the loss.

It is distillation from the model before training (Li & Hoiem, 2016, "Learning without Forgetting", arXiv 1606.09282,
equation 2, without a temperature). Direction and kind of text are those in which forgetting is measured. With p of the
base and q of the trained model at each position of general text,

    L = L_task + w KL,    KL = mean over positions of sum_v p(v) (log p(v) - log q(v)).

Its gradient with respect to a logit of v is (q(v) - p(v)) / positions. A penalty of this form on a policy's own
samples, in the other direction, is equation 2 of Ziegler et al. (2019, arXiv 1909.08593).
"""

import random

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..evaluation.kl import TOP_K, StoredBase, divergences, has_switch, switches_kept
from ..evaluation.metrics import model_inputs
from ..evaluation.retention import RetentionText
from ..interventions.masking import masks_off
from ..neurons.sites import base_model
from .config import AnchorConfig
from .retention_texts import read_texts


logger = logging.get_logger(__name__)

_SAME = 1e-5  # nats per token between a model at its start and the same with its adapter off


class KLToBase:
    """The texts on which a model is kept near its base, and what the base predicts on them.

    The base is the model before training. A new adapter that changes nothing yet is switched off in each step, which
    gives the base exactly. That does not work for full fine-tuning, for an adapter that has been trained before, or
    for one that changes the base weights. These are compared with the 64 most probable tokens that were predicted
    before the training, and with all others as one. That is a lower bound, with the same gradient except among these
    others.
    Forward masks are off: trained weights carry none.

    Args:
        config ([`AnchorConfig`]): what is asked for.

    Attributes:
        kind (`str` or `None`): `"exact"` or `"top-k"`, once a training has begun.
        last (`float` or `None`): the divergence of the last batch, in nats per token.

    Raises:
        FNSFTError: a source cannot be read, or holds no text.
    """

    def __init__(self, config: AnchorConfig) -> None:
        self.config = config
        self._rows = {
            name: read_texts("kl_datasets", name, source, tokens=config.kl_tokens)
            for name, source in config.sources().items()
        }
        self.text: RetentionText | None = None
        self.kind: str | None = None
        self.last: float | None = None
        self._stored: StoredBase | None = None
        self._at = (-1, 0)  # the step, and how many batches of it were read
        self._seed = 0

    def prepare(self, trainer) -> None:
        """Tokenise the texts for a trainer that has its model.

        Raises:
            FNSFTError: its model predicts no next token.
        """
        model = base_model(trainer.model)
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise FNSFTError(
                f"kl_to_base compares the next token of general text, which a {type(model).__name__} does not predict "
                "from what stands before it; drop kl_to_base"
            )
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        sequences = []
        for name, rows in self._rows.items():
            text = RetentionText.from_texts(rows, tokenizer, max_tokens=self.config.kl_tokens, name=f"the text {name}")
            if text.tokens < self.config.kl_tokens:
                logger.warning(
                    f"the text {name!r} holds {text.tokens} tokens, not the {self.config.kl_tokens} (kl_tokens)"
                )
            sequences += text.sequences
        self.text, self._seed = RetentionText.of_sequences(sequences), trainer.args.seed

    def begin(self, trainer) -> None:
        """Take the model of a trainer as the base, before it is trained or a checkpoint is loaded; once."""
        if self.kind is not None:
            return
        model = trainer.model
        self.kind = "exact"
        if not has_switch(model) or not self._first_divergence(model) <= _SAME:
            self.kind, self._stored = StoredBase.kind, StoredBase()
            self._store(model, show=trainer.is_world_process_zero() and not trainer.args.disable_tqdm)
        if trainer.is_world_process_zero():
            logger.warning(f"kl_to_base: {self.config.kl_to_base:g} x KL on {self.text.tokens} tokens; {self._told()}")

    def step(self, trainer, model: nn.Module) -> torch.Tensor:
        """Add the gradient of one batch of general text to those of the task.

        Args:
            trainer: in its training.
            model: as it trains it.

        Returns:
            What the batch adds to the loss of the step, detached.
        """
        numbers = self._next(trainer)
        plain = trainer.accelerator.unwrap_model(model)
        model.train()
        with masks_off(plain):  # in the backward pass too, where a checkpoint computes activations again
            with trainer.compute_loss_context_manager():
                kl = self.divergence(model, plain, numbers)
                loss = self.config.kl_to_base * kl / trainer.current_gradient_accumulation_steps
            trainer.accelerator.backward(loss)
        self.last = float(kl.detach())
        return loss.detach()

    def divergence(self, model: nn.Module, plain: nn.Module, numbers: list[int]) -> torch.Tensor:
        """KL(base || trained) of some sequences, the mean over their positions in nats, with its gradient.

        Args:
            model: the trained model.
            plain: the same without what spreads it over processes.
            numbers: of the sequences.
        """
        sequences = [self.text.sequences[number] for number in numbers]
        inputs = model_inputs(sequences, input_device(plain))
        base = None if self._stored is not None else self._without_adapter(plain, inputs)
        trained = model(**inputs).logits
        found = []
        for row, (number, ids) in enumerate(zip(numbers, sequences, strict=True)):
            logits = trained[row, : len(ids) - 1]  # (positions, vocabulary)
            if base is None:
                found.append(self._stored.distributions[number].divergences(logits))
            else:
                found.append(divergences(base[row, : len(ids) - 1], logits))
        return torch.cat(found).mean()

    def settings(self) -> dict:
        """What decides what is trained, as JSON values."""
        config = self.config
        return {
            "weight": config.kl_to_base,
            "batch_size": config.kl_batch_size,
            "tokens": self.text.tokens,
            "sha256": self.text.sha256,
        }

    def in_a_step(self, args) -> int:
        """How many sequences are read beside the batches of one step, by the arguments of a trainer."""
        return self.config.kl_batch_size * args.gradient_accumulation_steps * args.world_size

    def _next(self, trainer) -> list[int]:
        """The sequences beside this batch: all in turns, each turn in another order, in every process others."""
        step = trainer.state.global_step
        self._at = (step, self._at[1] + 1 if self._at[0] == step else 0)
        args, size, count = trainer.args, self.config.kl_batch_size, len(self.text.sequences)
        batch = step * args.gradient_accumulation_steps + self._at[1]
        first = (batch * args.world_size + args.process_index) * size
        numbers = []
        for place in range(first, first + size):
            turn, number = divmod(place, count)
            order = list(range(count))
            random.Random(f"{self._seed} {turn}").shuffle(order)
            numbers.append(order[number])
        return numbers

    @staticmethod
    @torch.no_grad()
    def _without_adapter(plain: nn.Module, inputs: dict) -> torch.Tensor:
        was_training = plain.training
        plain.eval()
        try:
            with switches_kept(plain), plain.disable_adapter():
                return plain(**inputs).logits
        finally:
            plain.train(was_training)

    @torch.no_grad()
    def _first_divergence(self, model: nn.Module) -> float:
        """Between a model at its start and the same with its adapter off, on one sequence."""
        was_training = model.training
        model.eval()
        try:
            with masks_off(model):
                return abs(float(self.divergence(model, model, [0])))
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _store(self, model: nn.Module, *, show: bool) -> None:
        """Keep what a model predicts on all texts."""
        was_training, device, size = model.training, input_device(model), 8
        model.eval()
        try:
            with masks_off(model):
                numbers = range(0, len(self.text.sequences), size)
                for first in tqdm(numbers, "what the base predicts (kl_to_base)", leave=False, disable=not show):
                    sequences = self.text.sequences[first : first + size]
                    each = list(range(first, first + len(sequences)))
                    self._stored.keep(model, model_inputs(sequences, device), each)
        finally:
            model.train(was_training)

    def _told(self) -> str:
        """How the base is had, and what that takes."""
        if self._stored is None:
            return "the base is the model with its adapter off, one more forward pass of these texts in each step"
        kept = sum(tensor.nbytes for tensor in self._stored.tensors().values()) / 2**20
        return (
            f"the base is what was predicted before the training, the {TOP_K} most probable tokens of each position "
            f"({kept:.1f} MiB)"
        )
