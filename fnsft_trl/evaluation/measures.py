"""Measure: one score of a model on rows, with what each row gives to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import bootstrap
from .bootstrap import DRAWS, Interval


def _mean(sums: torch.Tensor) -> float:
    return float(sums[0] / sums[1])


def _perplexity(sums: torch.Tensor) -> float:
    mean = float(sums[0] / sums[1])
    return math.inf if mean >= 700 else math.exp(mean)


def _bits(sums: torch.Tensor) -> float:
    return float(sums[0] / sums[1]) / math.log(2)


def _bleu(sums: torch.Tensor) -> float:
    from sacrebleu.metrics.bleu import BLEU

    numbers = [round(number) for number in sums.tolist()]
    return BLEU.compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9], smooth_method="exp").score


# How a score comes of sums over rows.
_FORMS: dict[str, Callable[[torch.Tensor], float]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "bits": _bits,
    "bleu": _bleu,
}


@dataclass(frozen=True, eq=False)
class Measure:
    """
    One score of a model on rows.

    Attributes:
        form (`str`): how it comes of sums over rows: `mean` (the first sum over the second), `perplexity` (its
            exponential, of nats and tokens), `bits` (of nats and bytes) or `bleu` (of sacrebleu's counts).
        rows (`torch.Tensor`): what each row gives, shape (rows, numbers), float64.
        numbers (`tuple[int, ...]`): of these rows in their dataset.
        rises (`bool`): whether more is better.
    """

    form: str
    rows: torch.Tensor
    numbers: tuple[int, ...]
    rises: bool

    @classmethod
    def of_rows(cls, values: Sequence[float], numbers: Sequence[int], *, rises: bool) -> "Measure":
        """The mean of one value for each row."""
        return cls.of_sums(values, [1] * len(values), numbers, rises=rises)

    @classmethod
    def of_sums(
        cls, values: Sequence[float], counts: Sequence[int], numbers: Sequence[int], *, rises: bool, form: str = "mean"
    ) -> "Measure":
        """A mean over what rows have several of, such as tokens: the sum of each row, and how many it has."""
        sums = [torch.tensor(each, dtype=torch.float64) for each in (values, counts)]
        return cls(form, torch.stack(sums, 1), tuple(numbers), rises)

    @property
    def value(self) -> float:
        """On all rows."""
        return _FORMS[self.form](self.rows.sum(0))

    @property
    def per_row(self) -> list[float]:
        """On each row alone."""
        return [_FORMS[self.form](row) for row in self.rows]

    def interval(self, *, draws: int = DRAWS, seed: int = 0) -> Interval:
        """With its 95% interval over rows."""
        return bootstrap.spread(_FORMS[self.form], self.rows, draws=draws, seed=seed)

    def minus(self, other: "Measure", *, draws: int = DRAWS, seed: int = 0) -> Interval | None:
        """How much higher it is than that of another model on the rows that both have; `None` where there are none.

        By a paired bootstrap: the interval says how much the choice of rows matters, not how much the seed of a
        training does.
        """
        mine = {number: row for row, number in enumerate(self.numbers)}
        theirs = {number: row for row, number in enumerate(other.numbers)}
        both = [number for number in other.numbers if number in mine]
        if not both:
            return None
        before = other.rows[[theirs[number] for number in both]]
        after = self.rows[[mine[number] for number in both]]
        return bootstrap.difference(_FORMS[self.form], before, after, draws=draws, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Value and number of rows, as JSON values."""
        return {"value": self.value, "rows": len(self.numbers)}
