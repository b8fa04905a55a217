"""report_study: the report of a continual run, as Markdown, HTML and results.json."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..report.figures import matrices_figure, stages_figure
from ..report.report import Report, format_table
from .outcome import Outcome, spread
from .tasks import Task


_COLUMNS = {
    "average": "average (AA)",
    "backward": "backward (BWT)",
    "forward_to_single": "forward, to one task alone",
    "forward_to_base": "forward, to the base",
    "forgetting": "forgetting",
}
_MEANING = (
    "With a(t, i) the score on task i after stage t of T, and stage 0 the model before training: the average is the "
    "mean of a(T, i); backward transfer the mean over i < T of a(T, i) - a(i, i), negative where later tasks hurt; "
    "forward transfer the mean of a(i, i) less the score of a model trained on task i alone, and the mean over i > 1 "
    "of a(i - 1, i) - a(0, i); forgetting the mean over i < T of the highest a(t, i) less a(T, i)."
)


def report_study(
    found: Sequence[Outcome],
    tasks: Sequence[Task],
    directory: str | os.PathLike,
    *,
    model: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> str:
    """Write `report.md`, `report.html` and `results.json`. The same cells give the same bytes.

    Args:
        found: of [`outcomes`].
        tasks: of the study.
        directory: that of the study.
        model: its name.
        seeds: of the trainings.
        settings: arm -> its options, for the table of them.

    Returns:
        The tables of all orders, as text.
    """
    page = Report(f"One task after another: {model}")
    scorers = ", ".join(f"{task.name} ({task.config.scorer}, {len(task.test)} rows)" for task in tasks)
    many = f"means over {len(seeds)} seeds with their standard deviation" if len(seeds) > 1 else "one seed"
    page.text(f"Scores are of {scorers}; higher is better. Values are {many}.")
    page.text(_MEANING)
    texts = []
    for order in dict.fromkeys(each.order for each in found):
        of_order = [each for each in found if each.order == order]
        texts.append(_order(page, order, of_order))
    page.heading("Arms")
    page.table(["arm", "options"], [[name, _shown(options)] for name, options in settings.items()])
    results = {
        "format": "fnsft_trl.continual",
        "format_version": 1,
        "model": model,
        "seeds": list(seeds),
        "tasks": {task.name: {"scorer": task.config.scorer, "train": len(task.train)} for task in tasks},
        "outcomes": [each.to_dict() for each in found],
    }
    page.save(Path(directory), results)
    return "\n\n".join(texts)


def _order(page: Report, order: str, found: Sequence[Outcome]) -> str:
    """The part of one order; gives its table as text."""
    names, texts = found[0].tasks, _texts(found)
    header, rows = transfer_table(found)
    page.heading(f"{order}: {', '.join(names)}")
    page.table(header, rows)
    page.table(["arm", *names], [[each.arm, *(f"{value:.3f}" for value in each.mean()[-1])] for each in found])
    page.text("Above: the score on each task at the end.")
    sequences = {each.arm: each.mean() for each in found if not each.is_multitask}
    if sequences:
        of_all = f"Scores on all tasks (columns) after each stage (rows), {order}"
        page.figure(f"matrix-{order}", matrices_figure(sequences, names), of_all)
        means = {arm: [fmean(row) for row in rows] for arm, rows in sequences.items()}
        of_mean = f"The mean score on all tasks after each stage, {order}"
        page.figure(f"average-{order}", stages_figure(means, measure="mean score on all tasks"), of_mean)
    for text in texts:
        rises = {
            each.arm: [0.0, *map(fmean, zip(*each.retention[text], strict=True))]
            for each in found
            if text in each.retention and not each.is_multitask
        }
        if rises:
            told = f"How much the cross-entropy of {text} has risen after each stage, {order}"
            picture = stages_figure(rises, measure=f"rise of the cross-entropy of {text}, nats per token")
            page.figure(f"retention-{text}-{order}", picture, told)
    _free(page, found)
    _overlap(page, found)
    return f"{order}: {', '.join(names)}\n{format_table(header, rows)}"


def transfer_table(found: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """The measures of all arms in one order, means and standard deviations over seeds, as a header and rows.

    Args:
        found: the arms.
    """
    texts, rows = _texts(found), []
    for each in found:
        measures = [spread(each.of_seeds(name)) for name in _COLUMNS]
        lost = [spread(each.lost(text), "{:+.3f}") if text in each.retention else "-" for text in texts]
        rows.append([each.arm, *measures, *lost])
    return ["arm", *_COLUMNS.values(), *(f"{text}: rise, nats" for text in texts)], rows


def _texts(found: Sequence[Outcome]) -> list[str]:
    """Names of the general texts that any arm was scored on."""
    return list(dict.fromkeys(text for each in found for text in each.retention))


def _free(page: Report, found: Sequence[Outcome]) -> None:
    """What growing protection leaves."""
    rows = [
        [each.arm, str(number), f"{free['fewest']} of {free['of']}", f"{free['share']:.0%}", str(free["scarce"])]
        for each in found
        for number, free in enumerate(each.free or (), 1)
    ]
    if rows:
        page.text("Directions that growing protection leaves free, at the input with the smallest share of them:")
        page.table(["arm", "after stage", "free", "share", "inputs with under a tenth"], rows)


def _overlap(page: Report, found: Sequence[Outcome]) -> None:
    """How far adapters of O-LoRA read what earlier ones read."""
    rows = [
        [each.arm, str(number), spread(list(of_stage))]
        for each in found
        for number, of_stage in enumerate(zip(*each.overlap, strict=True), 2)
    ]
    if rows:
        page.text(
            "The largest cosine between a row of A of a stage and one of an earlier stage, over all modules: 0 where "
            "all are orthogonal."
        )
        page.table(["arm", "stage", "overlap"], rows)


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in options.items())
