"""Report: text, tables and figures as Markdown, as one HTML file, and the numbers as results.json."""

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..finite import without_nan
from ..writing import disk_errors, files_written_whole


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #55636f; --line: #dde3ea; --head: #9fb0c0; --code: #f0f3f6;
  --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9fb0c0; --line: #33404c; --head: #5c7083;
  --code: #232d37; --page: #141a20; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 56rem;
  margin: 3rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-size: .92rem; }
td { font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
td.words { min-width: 18rem; text-align: left; }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid var(--head); }
img { max-width: 100%; background: #fff; } figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1.2rem 0; overflow-x: auto; } @media (max-width: 40rem) { figure svg { min-width: 32rem; } }
code { background: var(--code); padding: .1rem .3rem; border-radius: 3px; font-size: .88em; overflow-wrap: anywhere; }
"""

_PNG, _SVG = b"\x89PNG", b"<svg"
_SENTENCE = 40  # letters, above which a cell of a table is one


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

    def figure(self, name: str, picture: bytes, caption: str) -> None:
        """Add a picture.

        Args:
            name: of its file, which ends in `.png` or `.svg`.
            picture: PNG, or SVG, which goes into the page as it is.
            caption: what it shows.

        Raises:
            ValueError: it is neither.
        """
        if not picture.startswith((_PNG, _SVG)):
            raise ValueError(f"the picture {name!r} is neither PNG nor SVG")
        file = f"{name}.png" if picture.startswith(_PNG) else f"{name}.svg"
        self._parts.append(("figure", file, picture, caption))

    def save(
        self, directory: str | os.PathLike, results: dict[str, Any], *, beside: Mapping[str, str] | None = None
    ) -> None:
        """Write `report.md` with its pictures beside it, `report.html` with them inside, and `results.json`; over an
        older report all of them, or none.

        Args:
            directory: made where it does not exist.
            results: the numbers; NaN and infinite ones, which JSON does not have, are null there.
            beside: name -> text of further files of the report.

        Raises:
            FNSFTError: the disk does not take it.
        """
        texts = {"report.md": self._markdown(), "report.html": self._html(), **(beside or {})}
        texts["results.json"] = json.dumps(without_nan(results), indent=2, allow_nan=False) + "\n"
        with disk_errors(directory), files_written_whole(directory) as scratch:
            for part in self._parts:
                if part[0] == "figure":
                    (scratch / part[1]).write_bytes(part[2])
            for name, text in texts.items():
                (scratch / name).write_text(text, encoding="utf-8")

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
                blocks.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
            else:
                blocks.append(f"![{content[2]}]({content[0]})\n\n*{content[2]}*")
        return "\n\n".join(blocks) + "\n"

    def _html(self) -> str:
        blocks = [f"<h1>{html.escape(self.title)}</h1>"]
        for kind, *content in self._parts:
            if kind == "heading":
                blocks.append(f"<h2>{html.escape(content[0])}</h2>")
            elif kind == "text":
                blocks.append(f"<p>{_inline(content[0])}</p>")
            elif kind == "table":
                header, rows = content
                head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
                body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
                blocks.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            else:
                _, picture, caption = content
                inside = picture.decode() if picture.startswith(_SVG) else _image(picture, caption)
                blocks.append(f"<figure>{inside}<figcaption>{_inline(caption)}</figcaption></figure>")
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(blocks) + "\n</body>\n</html>\n"
        )


def _inline(text: str) -> str:
    """Text of Markdown in HTML: escaped, its code in `<code>`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _cell(text: str) -> str:
    """Text in a table of Markdown: on one line, in one cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _html_cell(text: str) -> str:
    """Text in a table of HTML; a sentence gets room, or it would make its row as high as it has words."""
    kind = ' class="words"' if len(text) > _SENTENCE else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
