"""Found: what the passes of a probe come to: measures of every condition, and a verdict on every network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.bootstrap import Interval
from .condition import Condition
from .controls import MATCHED, SHARED
from .data import ProbeData
from .records import INTACT, Records
from .statistics import Comparison, Sums, compare, effect, spread


_FEWEST_WORDS = 6


@dataclass(frozen=True)
class Verdict:
    """What is said of one network on one dataset.

    Attributes:
        network (`str`): its label.
        data (`str`): name of the data.
        effect (`Interval`): rise of the cross-entropy, in nats per token.
        share (`float` or `None`): of the damage that a lesion of all neurons does, where that does any.
        comparisons (`dict[str, Comparison]`): control -> how it stands beside it.
        words (`str`): the verdict.
    """

    network: str
    data: str
    effect: Interval
    share: float | None
    comparisons: dict[str, Comparison]
    words: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "network": self.network,
            "data": self.data,
            "effect": self.effect.to_dict(),
            "share_of_full": self.share,
            "controls": {name: each.to_dict() for name, each in self.comparisons.items()},
            "verdict": self.words,
        }


class Found:
    """Reads what was recorded.

    Args:
        data: what the model was scored on.
        conditions: what it was scored under.
        records: what was found.
        batch_size: of the passes.
    """

    def __init__(
        self, data: Sequence[ProbeData], conditions: Sequence[Condition], records: Records, batch_size: int
    ) -> None:
        self.data = {part.name: part for part in data}
        self.conditions, self.records = list(conditions), records
        self._batches = {part.name: part.batches(batch_size) for part in data}
        self._units: dict[str, np.ndarray] = {}
        for name, batches in self._batches.items():
            numbers = [item.unit for batch in batches for item in batch]
            self._units[name] = np.unique(numbers, return_inverse=True)[1]
        self._cache: dict[tuple[str, str], dict[str, Sums]] = {}

    def measures(self, data: str, key: str) -> dict[str, Sums]:
        """Measure -> what a condition gives on a dataset, over its rows."""
        if (data, key) not in self._cache:
            self._cache[data, key] = self._measures(data, key)
        return self._cache[data, key]

    def effect(self, data: str, key: str, measure: str = "cross_entropy") -> float:
        """How much a condition changes a measure."""
        return effect(self.measures(data, key)[measure], self.measures(data, INTACT)[measure])

    def full(self, data: str, measure: str = "cross_entropy") -> float:
        """How much a lesion of all neurons does."""
        return self.effect(data, self.of("full")[0].key, measure)

    def share_of_full(self, data: str, rise: float) -> float | None:
        """A rise of the cross-entropy as a share of that of a lesion of all neurons; `None` where that does none."""
        full = self.full(data)
        return rise / full if full > 0 else None

    def of(self, curve: str, **chosen: Any) -> list[Condition]:
        """The conditions of a curve, with some attributes."""
        return [
            condition
            for condition in self.conditions
            if condition.curve == curve and all(vars(condition)[name] == value for name, value in chosen.items())
        ]

    def degenerate(self, data: str, key: str) -> float | None:
        """Share of the continuations that are no text any more; `None` where no prompt was continued."""
        texts = self.records.texts(data, key)
        return None if not texts else sum(map(is_degenerate, texts)) / len(texts)

    def verdicts(self, data: str) -> list[Verdict]:
        """On every network, beside every control."""
        lesions = {condition.network: condition for condition in self.of("lesion", selector="networks")}
        sums = {label: self.measures(data, condition.key)["cross_entropy"] for label, condition in lesions.items()}
        names = list(dict.fromkeys(c.selector for c in self.of("lesion") if c.selector != "networks"))
        compared = {}
        for name in names:
            drawn = {
                label: [
                    self.measures(data, c.key)["cross_entropy"]
                    for c in self.of("lesion", selector=name, network=label)
                ]
                for label in lesions
            }
            compared[name] = compare(sums, drawn, name, are_shared=name in SHARED)
        intact = self.measures(data, INTACT)["cross_entropy"]
        found = []
        for label, condition in lesions.items():
            value = self.effect(data, condition.key)
            comparisons = {name: compared[name][label] for name in names}
            rise = Interval(value, *spread(sums[label], intact))
            offset = {n: Comparison(**{**vars(c), **_over(c, intact.mean)}) for n, c in comparisons.items()}
            found.append(Verdict(label, data, rise, self.share_of_full(data, value), offset, in_words(rise, offset)))
        return found

    def _measures(self, data: str, key: str) -> dict[str, Sums]:
        items = [item for batch in self._batches[data] for item in batch]
        scores = self.records.scores(data, len(self._batches[data]), key)
        units = self._units[data]
        counts = np.array([item.tokens if item.counts else 0 for item in items], float)
        counted = np.array([item.counts for item in items], float)
        found = {
            "cross_entropy": _summed(scores["nll"] * counted, counts, units),
            "kl": _summed(scores["kl"] * counted, counts, units),
        }
        if self.data[data].has_answers:
            answers = np.array([item.is_answer for item in items], float)
            found["exact_match"] = _summed(scores["exact"] * answers, answers, units)
        if self.data[data].questions:
            found["accuracy"] = self._accuracy(data, items, scores["nll"], units)
        return found

    def _accuracy(self, data: str, items: Sequence, nll: np.ndarray, units: np.ndarray) -> Sums:
        """How often the right answer is the likeliest."""
        best: dict[int, tuple[float, int]] = {}
        for item, value in zip(items, nll, strict=True):
            found = (float(value), item.choice)
            best[item.unit] = min(best.get(item.unit, found), found)
        right = {unit: float(best[unit][1] == row.answer) for unit, row in self.data[data].questions.items()}
        values = np.zeros(units.max() + 1)
        for item, unit in zip(items, units, strict=True):
            values[unit] = right[item.unit]
        return Sums(values, np.ones_like(values))


def _summed(values: np.ndarray, counts: np.ndarray, units: np.ndarray) -> Sums:
    return Sums(np.bincount(units, values), np.bincount(units, counts))


def _over(comparison: Comparison, intact: float) -> dict[str, float]:
    """Means of a control as rises over the intact model."""
    return {"mean": comparison.mean - intact, "highest": comparison.highest - intact}


_CALLED = {
    "activation_rms": "the loudest neurons of the same layers",
    "weight_norm": "the neurons with the largest weights",
}


def in_words(rise: Interval, comparisons: dict[str, Comparison]) -> str:
    """The verdict on a network, in plain words.

    Args:
        rise: of the cross-entropy under its lesion.
        comparisons: control -> how it stands beside it.
    """
    if rise.low <= 0:
        return "silencing it does no damage that could be told from none"
    few = [name for name in MATCHED if _too_few(comparisons.get(name))]
    if few:
        return f"it does damage; {comparisons[few[0]].draws} draws are too few for a verdict (20 are needed)"
    random, matched = (comparisons[name].is_stronger for name in MATCHED)
    if not random:
        return "no stronger than random neurons of the same layers: it may be chance"
    if not matched:
        return "stronger than random neurons, but no stronger than neurons of the same amplitude: it may be loudness"
    others = [name for name, each in comparisons.items() if each.draws == 1]
    beaten = [_CALLED[name] for name in others if comparisons[name].is_stronger]
    stronger = [_CALLED[name] for name in others if comparisons[name].interval[1] < 0]
    told = "stronger than random neurons and than neurons of the same amplitude"
    told += f"; also than {', '.join(beaten)}" if beaten else ""
    return told + (f"; weaker than {', '.join(stronger)}" if stronger else "")


def _too_few(comparison: Comparison | None) -> bool:
    return comparison is None or comparison.draws < 20


def is_degenerate(text: str) -> bool:
    """Whether a continuation is no text any more: nothing, or the same over and over.

    Of its runs of three words (of three characters, where it has fewer than 6 words) fewer than half are distinct.
    """
    words: Sequence[str] = re.findall(r"\w+", text)
    if not words:
        return True
    parts = words if len(words) >= _FEWEST_WORDS else re.sub(r"\s+", " ", text.strip())
    runs = [tuple(parts[start : start + 3]) for start in range(len(parts) - 2)]
    return len(runs) >= _FEWEST_WORDS and len(set(runs)) < len(runs) / 2
