"""Figures of reports, as PNG. They need matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from ..errors import FNSFTError


def check_pyplot() -> None:
    """Check that pictures can be drawn.

    Raises:
        FNSFTError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise FNSFTError("reports need matplotlib; run: python -m pip install 'fnsft-trl[report]'")


def _pyplot():
    check_pyplot()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finished(figure, axes, *, columns: int) -> bytes:
    """A picture of one pair of axes with its legend above, in so many columns."""
    axes.grid(color="#e6ebf0", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=columns)
    return _png(figure)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    _pyplot().close(figure)
    return buffer.getvalue()


def comparison_figure(values: Sequence[Sequence[float]], measure: str) -> bytes:
    """How much alike the networks of two templates are, as a heat map in PNG.

    Args:
        values: one row for each network of A, one value in [0, 1] for each network of B.
        measure: what the values are.
    """
    pyplot = _pyplot()
    rows, columns = len(values), len(values[0])
    figure, axes = pyplot.subplots(figsize=(2.4 + 0.34 * columns, 1.4 + 0.34 * rows), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    axes.set_xticks(range(columns))
    axes.set_yticks(range(rows))
    axes.set_xlabel("network of B")
    axes.set_ylabel("network of A")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=measure)
    return _png(figure)


def curves_figure(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], *, learning: str, forgetting: str
) -> bytes:
    """Learning against forgetting, as PNG: a colour for each arm, a line for each seed, its end marked.

    Args:
        curves: arm -> for each seed, the points (what was learnt, what was forgotten) in their order.
        learning, forgetting: labels of the axes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colors = ["#c0392b", "#3b6ea5", "#8a8f98", "#2e8b57", "#b8860b", "#7d3c98"]
    for (name, lines), color in zip(curves.items(), colors * len(curves), strict=False):
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linewidth=1.2, alpha=0.6, zorder=2)
        ends = [line[-1] for line in lines]
        x, y = (sum(values) / len(ends) for values in zip(*ends, strict=True))
        axes.scatter(*zip(*ends, strict=True), s=70, color=color, zorder=3, label=f"{name} ({x:.2f}, {y:+.3f})")
    # Both axes hold their zero, so that distances can be compared by eye.
    points = [point for lines in curves.values() for line in lines for point in line]
    axes.set_xlim(0, 1.25 * (max(x for x, _ in points) or 1))
    lowest, highest = min(0, *(y for _, y in points)), max(0, *(y for _, y in points))
    margin = (highest - lowest) or 1
    axes.set_ylim(lowest - 0.08 * margin, highest + 0.12 * margin)
    axes.axhline(0, color="#9fb0c0", linewidth=1, zorder=1)
    axes.set_xlabel(learning)
    axes.set_ylabel(forgetting)
    return _finished(figure, axes, columns=2)


def tradeoff_figure(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    loss: str,
    divergence: str,
    limit: float | None = None,
    chosen: tuple[float, float] | None = None,
) -> bytes:
    """What ways to restore a fine-tune cost and give, as PNG: a colour for each kind of way, each point with its name.

    Args:
        points: kind of way -> loss on the task, divergence (on a logarithmic axis) and name of each.
        loss, divergence: labels of the axes.
        limit: loss up to which a way may be chosen.
        chosen: the point that is marked.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    colors = ["#8a8f98", "#3b6ea5", "#c0392b", "#2e8b57", "#b8860b"]
    every = [x for of_kind in points.values() for x, *_ in of_kind]
    middle = (min(every) + max(every)) / 2  # from here on, names stand to the left, where there is room
    for (kind, of_kind), color in zip(points.items(), colors, strict=False):
        x, y, names = zip(*of_kind, strict=True)
        axes.plot(x, [max(value, 1e-6) for value in y], "o-", color=color, linewidth=1, markersize=5, label=kind)
        for place in zip(x, y, names, strict=True):
            side = {"ha": "right", "xytext": (-5, -9)} if place[0] > middle else {"ha": "left", "xytext": (5, 4)}
            axes.annotate(place[2], place[:2], fontsize=7, textcoords="offset points", color="#55636f", **side)
    if chosen is not None:
        axes.scatter(*chosen, s=160, facecolors="none", edgecolors="#1c2733", linewidths=1.4, zorder=4, label="chosen")
    if limit is not None:
        axes.axvline(limit, color="#9fb0c0", linewidth=1, linestyle="--", label="most that may be lost of the task")
    axes.set_yscale("log")
    axes.set_xlabel(loss)
    axes.set_ylabel(divergence)
    return _finished(figure, axes, columns=3)


def learning_figure(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    loss: str,
    divergence: str,
    targets: Mapping[str, float],
) -> bytes:
    """Learning against forgetting of arms with several seeds, as PNG: a curve for each arm, its seeds as dots.

    Args:
        curves: arm -> for each seed, the points (loss on the task, divergence) of its path, all paths of an arm of the
            same length; the curve is their mean, of the divergence the geometric one.
        loss, divergence: labels of the axes; that of the divergence is logarithmic.
        targets: name -> loss, marked by a line.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.8), layout="constrained")
    colors = ["#c0392b", "#3b6ea5", "#2e8b57", "#8a8f98", "#b8860b", "#7d3c98", "#1c2733", "#d98880"]
    for (name, lines), color in zip(curves.items(), colors * len(curves), strict=False):
        seeds = [[(x, max(y, 1e-6)) for x, y in line] for line in lines]
        axes.scatter(*zip(*(place for line in seeds for place in line), strict=True), s=14, color=color, alpha=0.6)
        steps = list(zip(*seeds, strict=True))
        x = [sum(place[0] for place in step) / len(step) for step in steps]
        y = [math.exp(sum(math.log(place[1]) for place in step) / len(step)) for step in steps]
        axes.plot(x, y, "-", color=color, linewidth=1.6, label=name)
    for name, value in targets.items():
        axes.axvline(value, color="#9fb0c0", linewidth=1, linestyle="--")
        axes.annotate(name, (value, 0.985), xycoords=("data", "axes fraction"), fontsize=8, va="top", color="#55636f")
    axes.set_yscale("log")
    axes.invert_xaxis()  # to the right, more is learnt
    axes.set_xlabel(loss)
    axes.set_ylabel(divergence)
    return _finished(figure, axes, columns=4)


def matrices_figure(matrices: Mapping[str, Sequence[Sequence[float]]], columns: Sequence[str]) -> bytes:
    """Scores on every task after every stage, a heat map for each arm, as PNG.

    Args:
        matrices: arm -> a row for each stage, the model before training first, with a score in [0, 1] for each task.
        columns: names of the tasks.
    """
    pyplot = _pyplot()
    wide = min(3, len(matrices))
    high = math.ceil(len(matrices) / wide)
    count, rows = len(columns), max(map(len, matrices.values()))
    size = (wide * (1.6 + 0.55 * count), high * (1.4 + 0.42 * rows))
    figure, grid = pyplot.subplots(high, wide, figsize=size, layout="constrained", squeeze=False)
    places = list(grid.flat)
    for axes in places[len(matrices) :]:
        axes.set_axis_off()
    for axes, (name, values) in zip(places, matrices.items(), strict=False):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for stage, of_stage in enumerate(values):
            for place, value in enumerate(of_stage):
                color = "white" if value < 0.6 else "#1c2733"
                axes.text(place, stage, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(count), columns, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(values)), ["before", *range(1, len(values))], fontsize=7)
        axes.set_ylabel("after stage", fontsize=8)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=places, label="score", shrink=0.8)
    return _png(figure)


def stages_figure(curves: Mapping[str, Sequence[float]], *, measure: str) -> bytes:
    """How something goes from stage to stage, a line for each arm, as PNG.

    Args:
        curves: arm -> a value for each stage, the model before training first.
        measure: label of the axis.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colors = ["#c0392b", "#3b6ea5", "#2e8b57", "#8a8f98", "#b8860b", "#7d3c98", "#1c2733", "#d98880"]
    for number, (name, values) in enumerate(curves.items()):
        line = "-" if number < len(colors) else "--"
        axes.plot(values, line, marker="o", markersize=4, color=colors[number % len(colors)], label=name)
    most = max(map(len, curves.values()))
    axes.set_xticks(range(most), ["before", *range(1, most)])
    axes.set_xlabel("after stage")
    axes.set_ylabel(measure)
    return _finished(figure, axes, columns=4)
