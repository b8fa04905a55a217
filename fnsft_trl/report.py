"""Report: text, tables and figures as Markdown, as one HTML file, and the numbers as results.json."""

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import FNSFTError
from .template import FunctionalNetworkTemplate


_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2733; max-width: 56rem; margin: 3rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #9fb0c0; }
img { max-width: 100%; } figcaption { color: #55636f; font-size: .9rem; } figure { margin: 1.2rem 0; }
code { background: #f0f3f6; padding: .1rem .3rem; border-radius: 3px; font-size: .88em; overflow-wrap: anywhere; }
"""


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as aligned plain text: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


@dataclass
class Report:
    """A report that is built from top to bottom and saved in three forms.

    Attributes:
        title (`str`): its heading.
    """

    title: str
    _parts: list[tuple] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Add a section heading."""
        self._parts.append(("heading", text))

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(("text", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of strings."""
        self._parts.append(("table", header, rows))

    def figure(self, name: str, png: bytes, caption: str) -> None:
        """Add a picture; `name` becomes its file name."""
        self._parts.append(("figure", name, png, caption))

    def save(self, directory: str | os.PathLike, results: dict[str, Any]) -> None:
        """Write `report.md` with its pictures beside it, `report.html` with them inside, and `results.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for part in self._parts:
            if part[0] == "figure":
                (directory / f"{part[1]}.png").write_bytes(part[2])
        (directory / "report.md").write_text(self._markdown(), encoding="utf-8")
        (directory / "report.html").write_text(self._html(), encoding="utf-8")
        (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    def _markdown(self) -> str:
        blocks = [f"# {self.title}"]
        for kind, *content in self._parts:
            if kind == "heading":
                blocks.append(f"## {content[0]}")
            elif kind == "text":
                blocks.append(content[0])
            elif kind == "table":
                header, rows = content
                lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
                blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            else:
                blocks.append(f"![{content[2]}]({content[0]}.png)\n\n*{content[2]}*")
        return "\n\n".join(blocks) + "\n"

    def _html(self) -> str:
        blocks = [f"<h1>{html.escape(self.title)}</h1>"]
        for kind, *content in self._parts:
            if kind == "heading":
                blocks.append(f"<h2>{html.escape(content[0])}</h2>")
            elif kind == "text":
                blocks.append(f"<p>{html.escape(content[0])}</p>")
            elif kind == "table":
                header, rows = content
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
                body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
                blocks.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            else:
                _, png, caption = content
                data = base64.b64encode(png).decode()
                alt = html.escape(caption, quote=True)
                blocks.append(
                    f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}'
                    "</figcaption></figure>"
                )
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(blocks) + "\n</body>\n</html>\n"
        )


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


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    _pyplot().close(figure)
    return buffer.getvalue()


def networks_figure(template: FunctionalNetworkTemplate) -> bytes:
    """The networks over the layers: the share of each layer's neurons in each network, and its reliability, as PNG."""
    pyplot = _pyplot()
    layers = sorted(template.widths)
    share = [[100 * c.layers.get(layer, 0) / template.widths[layer] for layer in layers] for c in template.components]
    count = len(template.components)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 1.4 + 0.34 * count), width_ratios=[5, 1.1], layout="constrained", sharey=True
    )
    image = left.imshow(share, aspect="auto", cmap="magma_r", interpolation="nearest")
    left.set_xticks(range(0, len(layers), max(1, len(layers) // 15)), layers[:: max(1, len(layers) // 15)])
    left.set_yticks(range(count))
    left.set_xlabel("layer")
    left.set_ylabel("network")
    left.set_title("share of each layer's neurons in the network", fontsize=11, loc="left")
    figure.colorbar(image, ax=left, label="% of the layer", pad=0.01)
    reliability = [float("nan") if c.reliability is None else c.reliability for c in template.components]
    right.barh(range(count), reliability, color="#3b6ea5", height=0.65)
    right.set_xlim(0, 1)
    right.set_xticks([0, 0.5, 1])
    right.set_title("reliability", fontsize=11, loc="left")
    right.tick_params(left=False)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
    return _png(figure)


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


def trade_off_figure(points: Sequence[tuple[str, float, float]], *, learning: str, forgetting: str) -> bytes:
    """Learning against forgetting, as PNG: one labelled point for each arm.

    Args:
        points: (name, what was learnt, what was forgotten).
        learning, forgetting: labels of the axes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colors = ["#c0392b", "#3b6ea5", "#8a8f98", "#2e8b57", "#b8860b", "#7d3c98"]
    for (name, x, y), color in zip(points, colors * len(points), strict=False):
        axes.scatter(x, y, s=80, color=color, zorder=3, label=f"{name} ({x:.2f}, {y:+.3f})")
    # Both axes hold their zero, so that distances can be compared by eye.
    axes.set_xlim(0, 1.25 * max(x for _, x, _ in points))
    lowest, highest = min(0, *(y for _, _, y in points)), max(0, *(y for _, _, y in points))
    axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.12 * (highest - lowest))
    axes.axhline(0, color="#9fb0c0", linewidth=1, zorder=1)
    axes.set_xlabel(learning)
    axes.set_ylabel(forgetting)
    axes.grid(color="#e6ebf0", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=2)
    return _png(figure)
