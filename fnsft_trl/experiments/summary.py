"""What the cells of an experiment say of each arm, and of each pair of arms, with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats

from ..evaluation.bootstrap import spread


Cell = Mapping[str, Any]

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value (`float`): the mean over seeds.
        low, high (`float` or `None`): ends of the interval; `None` where there is none.
        over (`str` or `None`): what it is over: `seeds` (Student's t), or with one seed `texts` or `rows` (a paired
            bootstrap), which says nothing of what another seed would give.
        n (`int`): the number of seeds.
    """

    value: float
    low: float | None
    high: float | None
    over: str | None
    n: int


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value for each seed; without an interval for one seed."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * spread
    return Estimate(mean, mean - half, mean + half, "seeds", count)


def over_parts(differences: Sequence[float], weights: Sequence[float], what: str) -> Estimate:
    """The ratio of two sums over texts or rows, with an interval by a bootstrap over them.

    Args:
        differences: one for each part, between two models that both were measured on.
        weights: how much of a part there is, such as its tokens.
        what: `texts` or `rows`.
    """
    parts = torch.tensor([*zip(differences, weights, strict=True)], dtype=torch.float64)
    value, low, high = spread(lambda sums: float(sums[0] / sums[1]), parts)
    return Estimate(value, low, high, what, 1)


def of_arm(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the cells of one arm come to: name -> Estimate, and series -> measure -> Estimate under `retention`.

    Args:
        cells: of one arm, one for each seed.
    """
    names = [name for name, value in cells[0]["scores"].items() if value is not None]
    found: dict[str, Any] = {name: over_seeds([cell["scores"][name] for cell in cells]) for name in names}
    found["masked_nll"] = None
    if all(cell["masked"] for cell in cells):
        found["masked_nll"] = over_seeds([cell["masked"]["nll"] for cell in cells])
    found["retention"] = {}
    for name, series in cells[0]["points"][-1]["retention"].items():
        measures = {
            measure: over_seeds([cell["points"][-1]["retention"][name][measure] for cell in cells])
            for measure in series
        }
        if len(cells) == 1 and "rise" in measures:
            text = cells[0]["retention"][name]
            change = [after - before for before, after in zip(text["base_nll"], text["nll"], strict=True)]
            measures["rise"] = over_parts(change, text["sequence_tokens"], "texts")
        found["retention"][name] = measures
    return found


def of_pair(first: Sequence[Cell], second: Sequence[Cell]) -> dict[str, Estimate]:
    """How much more an arm has than another: measure -> Estimate, of those that are comparable.

    Args:
        first, second: the cells of both, for the same seeds; the differences are those of the second less the first.
    """
    pairs = list(zip(first, second, strict=True))
    found = {}
    if all(a["eval_data"] == b["eval_data"] for a, b in pairs):
        names = ("nll", "exact_match") if first[0]["scored"]["answers"] else ("nll",)
        found |= {name: _difference(pairs, ["scores", name], ["rows", name], None) for name in names}
    for name, series in first[0]["retention"].items():
        same = all(a["retention"][name]["sha256"] == b["retention"][name]["sha256"] for a, b in pairs)
        if same and "rise" in first[0]["points"][-1]["retention"][name]:
            path = ["points", -1, "retention", name, "rise"]
            found[f"{name}: rise"] = _difference(pairs, path, ["retention", name, "nll"], series["sequence_tokens"])
    return found


def _difference(
    pairs: Sequence[tuple[Cell, Cell]], path: Sequence, parts: Sequence, weights: Sequence[float] | None
) -> Estimate:
    """The second of each pair less the first; over the parts of one pair, over the seeds of several."""
    if len(pairs) > 1:
        return over_seeds([_at(b, path) - _at(a, path) for a, b in pairs])
    ((a, b),) = pairs
    change = [float(y) - float(x) for x, y in zip(_at(a, parts), _at(b, parts), strict=True)]
    return over_parts(change, weights or [1] * len(change), "rows" if weights is None else "texts")


def _at(cell: Any, path: Sequence) -> Any:
    for key in path:
        cell = cell[key]
    return cell


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options in which arms differ: option -> arm -> value, where it was given.

    Args:
        settings: arm -> option -> value.
    """
    names = sorted({name for options in settings.values() for name in options})
    found = {}
    for name in names:
        values = {arm: options[name] for arm, options in settings.items() if name in options}
        if len(values) < len(settings) or any(value != next(iter(values.values())) for value in values.values()):
            found[name] = values
    return found
