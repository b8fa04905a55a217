"""How well a model predicts general text, and how far it is from another one there."""

import math

from torch import nn

from ..compat.accelerate import input_device
from ..finite import check_finite
from ..interventions.masking import masks_off
from .kl import divergences
from .measures import Measure
from .metrics import evaluating, model_inputs, token_scores
from .retention import RetentionText
from .share import ALONE, Share


def score_text(
    model: nn.Module,
    text: RetentionText,
    *,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    share: Share = ALONE,
    name: str = "text",
) -> dict[str, Measure]:
    """Score a model on general text, with the masks that are on it.

    Args:
        model: a causal language model.
        text: the text, tokenised as both models do.
        reference: the model that it is compared with, without masks, in full: both are in memory.
        batch_size: sequences in a forward pass.
        share: the part of this process.
        name: of the work, beside the progress.

    Returns:
        `cross_entropy`, in nats per token; with a reference also `kl`, KL(reference || model) on the same tokens, in
        nats per token. Both are infinite where the model rules out a token of the text.

    Raises:
        FNSFTError: a model predicts NaN.
    """

    def work(numbers: list[int]) -> list[tuple[float, float]]:
        sequences = [text.sequences[number] for number in numbers]
        inputs = model_inputs(sequences, input_device(model))
        logits = model(**inputs).logits
        base = None
        if reference is not None:
            with masks_off(reference):  # which may be the same model, under a mask
                base = reference(**inputs).logits
        found = []
        for row, ids in enumerate(sequences):
            scores = token_scores(logits[row], inputs["input_ids"][row], 1, len(ids))
            kl = 0.0
            if base is not None:
                kl = float(divergences(base[row, : len(ids) - 1], logits[row, : len(ids) - 1]).cpu().double().sum())
            found.append((float(scores.nll.double().sum()), kl))
        return found

    with evaluating(model):
        lengths = [len(ids) for ids in text.sequences]
        sums = share.in_batches(work, lengths, batch_size=batch_size, name=name)
    # Infinite where the model rules out what the reference does not.
    check_finite([kl for _, kl in sums if kl != math.inf], f"the KL from the reference on {name}")
    tokens = [length - 1 for length in lengths]
    numbers = range(len(lengths))
    measures = {"cross_entropy": Measure.of_sums([nll for nll, _ in sums], tokens, numbers, rises=False)}
    if reference is not None:
        measures["kl"] = Measure.of_sums([kl for _, kl in sums], tokens, numbers, rises=False)
    return measures
