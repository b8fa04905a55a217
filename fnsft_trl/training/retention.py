"""RetentionCallback: how much general ability is left, while training goes on. It works with any SFTTrainer."""

from collections.abc import Iterable

from transformers import TrainerCallback

from ..errors import FNSFTError
from ..evaluation.retention import RetentionText
from ..interventions.masking import masks_off


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
