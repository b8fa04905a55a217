"""Outcome: what cells say of an arm in an order: the score matrix of each seed, and what general text has lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .plan import Plan, Stage
from .study import stage_name
from .transfer import ScoreMatrix


@dataclass(frozen=True)
class Outcome:
    """An arm in an order, over seeds.

    Attributes:
        arm (`str`): the arm.
        order (`str`): the order.
        tasks (`tuple[str, ...]`): its tasks.
        is_multitask (`bool`): whether all are trained at once, so that there is one stage.
        matrices (`list[list[list[float]]]`): of each seed the scores on the tasks (columns) after each stage (rows),
            the model before training first.
        transfers (`list[dict]`): of each seed, what [`Transfer`] says; in multitask the average alone.
        retention (`dict[str, list[list[float]]]`): name of a general text -> of each seed, how much its cross-entropy
            has risen over the model before training after each stage, in nats per token.
        free (`list[dict] or None`): of growing protection, the directions that are left after each stage but the last,
            with the first seed.
        overlap (`list[list[float]]`): of O-LoRA, of each seed, the largest cosine of a row of A of each stage but the
            first with one of an earlier stage.
    """

    arm: str
    order: str
    tasks: tuple[str, ...]
    is_multitask: bool
    matrices: list[list[list[float]]]
    transfers: list[dict[str, float | None]]
    retention: dict[str, list[list[float]]]
    free: list[dict[str, Any]] | None
    overlap: list[list[float]]

    def mean(self) -> list[list[float]]:
        """The mean matrix over seeds."""
        return [[fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*self.matrices, strict=True)]

    def of_seeds(self, name: str) -> list[float]:
        """A measure of each seed; empty where it is not defined."""
        return [found[name] for found in self.transfers if found[name] is not None]

    def lost(self, text: str) -> list[float]:
        """How much the cross-entropy of a general text has risen at the end, of each seed."""
        return [rises[-1] for rises in self.retention[text]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "arm": self.arm,
            "order": self.order,
            "tasks": list(self.tasks),
            "multitask": self.is_multitask,
            "matrices": self.matrices,
            "mean": self.mean(),
            "transfer": self.transfers,
            "retention": self.retention,
            "free": self.free,
            "overlap": self.overlap,
        }


def outcomes(
    plan: Plan, base: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Outcome]:
    """What the cells of a study say, order by order, arm by arm.

    Args:
        plan: of the study.
        base: the cell of the model before training.
        cells: those of all stages.
        seeds: of the trainings.
    """
    by_key = {(cell["arm"], cell["seed"]): cell for cell in cells}
    return [_outcome(plan, arm, order, base, by_key, seeds) for order in plan.orders for arm in plan.ways]


def _outcome(plan: Plan, arm: str, order: str, base, cells, seeds) -> Outcome:
    names, stages, way = plan.orders[order], plan.stages(arm, order), plan.ways[arm]
    matrices, transfers, retention, free, overlap = [], [], {}, None, []
    for seed in seeds:
        of_stages = [cells[stage_name(arm, stage), seed] for stage in stages]
        scores = [[scored(base)[name] for name in names]]
        scores += [[scored(cell["also"])[name] for name in names] for cell in of_stages]
        matrices.append(scores)
        if way.multitask:
            transfers.append(dict.fromkeys(_MEASURES) | {"average": fmean(scores[-1])})
        else:
            single = None
            if plan.single:
                single = {n: scored(cells[stage_name(arm, Stage(((n,),))), seed]["also"])[n] for n in names}
            transfers.append(ScoreMatrix(names, scores, single).transfer().to_dict())
        for text, rises in _rises(of_stages).items():
            retention.setdefault(text, []).append(rises)
        grown = [cell["also"]["free"] for cell in of_stages if "free" in cell["also"]]
        free = grown if grown and free is None else free
        overlap.append([cell["also"]["overlap"] for cell in of_stages if "overlap" in cell["also"]])
    return Outcome(arm, order, names, way.multitask, matrices, transfers, retention, free, overlap)


_MEASURES = ("average", "backward", "forward_to_single", "forward_to_base", "forgetting")


def scored(found: Mapping[str, Any]) -> dict[str, float]:
    """Name of a task -> score, of a cell of the model before training or what a stage says beside its training."""
    return {name: each["score"] for name, each in found["tasks"].items()}


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """A mean over seeds, with the standard deviation where there are several, in words."""
    if not values:
        return "-"
    told = form.format(fmean(values))
    return f"{told} ± {stdev(values):.3f}" if len(values) > 1 else told


def _rises(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Name of a general text -> rise of its cross-entropy after each stage over the model before the first."""
    found = {}
    for name, first in stages[0]["retention"].items():
        if any(cell["retention"][name]["sha256"] != first["sha256"] for cell in stages):
            continue  # the prompts of each stage's own task
        tokens = sum(first["sequence_tokens"])
        start = sum(first["base_nll"]) / tokens
        found[name] = [sum(cell["retention"][name]["nll"]) / tokens - start for cell in stages]
    return found
