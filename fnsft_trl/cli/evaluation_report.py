"""The report of `fnsft evaluate`: scores, differences row by row, and all that they come from."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.measures import Interval
from ..evaluation.settings import EvaluationConfig
from ..finite import without_nan
from ..report import Report, format_table


_PACKAGES = (
    *("torch", "transformers", "peft", "datasets", "tokenizers", "sacrebleu", "rouge-score", "lm-eval"),
    "accelerate",
)
_NOTE = (
    "Intervals: 95%, by a bootstrap over rows (paired for differences). They say how much the choice of rows matters, "
    "and nothing about the seed of the training."
)


def write_report(results: list, settings: EvaluationConfig, output: Path, about: dict[str, Any]) -> None:
    """Write the report, and print what matters of it.

    Args:
        results: of all models ([`~fnsft_trl.cli.evaluation_run.Evaluated`]), the first of which the others are
            compared with.
        settings: how rows were scored.
        output: directory of the report.
        about: sources of the data, and the general texts, as JSON values.
    """
    draws = {"draws": settings.bootstrap_draws, "seed": settings.seed}
    values = {each.name: {name: m.interval(**draws) for name, m in each.scores.measures.items()} for each in results}
    first, *rest = results
    differences = {
        each.name: {
            name: difference
            for name, measure in each.scores.measures.items()
            if name in first.scores.measures
            and (difference := measure.minus(first.scores.measures[name], **draws)) is not None
        }
        for each in rest
    }
    header, rows = _scores_table(results, values)
    report = Report("fnsft evaluate")
    report.text(_summary(results, settings))
    report.heading("Scores")
    report.table(header, rows)
    printed = [format_table(header, rows)]
    if rest:
        table = _differences_table(rest, differences)
        report.heading(f"Differences from {first.name}")
        report.table(*table)
        printed += [f"Differences from {first.name}:", format_table(*table)]
    report.text(_NOTE)
    _describe(report, results, about)
    scores = "".join(
        json.dumps(without_nan({"model": each.name, "data": data, **entry}), ensure_ascii=False) + "\n"
        for each in results
        for data, of_rows in each.scores.rows.items()
        for entry in of_rows
    )
    report.save(output, _content(results, settings, about, values, differences), beside={"scores.jsonl": scores})
    print("\n\n".join([*printed, _NOTE, f"Report: {output / 'report.html'} (also report.md, results.json)"]))


def _summary(results: list, settings: EvaluationConfig) -> str:
    masked = [each.name for each in results if each.about.get("mask")]
    count = "one model" if len(results) == 1 else f"{len(results)} models"
    text = f"Scores of {count}; seed {settings.seed}. Forward masks are off"
    return f"{text}, but for {', '.join(masked)}." if masked else f"{text}."


def _names(results: list) -> list[str]:
    """Of all measures, in their order."""
    return list(dict.fromkeys(name for each in results for name in (*each.scores.measures, *each.others)))


def _scores_table(results: list, values: dict) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in _names(results):
        counts = {len(each.scores.measures[name].numbers) for each in results if name in each.scores.measures}
        cells = []
        for each in results:
            if name in values[each.name]:
                cells.append(_shown(values[each.name][name]))
            else:
                cells.append(f"{each.others[name]:.4g}" if name in each.others else "")
        rows.append([name, "/".join(map(str, sorted(counts))), *cells])
    return ["score", "rows", *(each.name for each in results)], rows


def _differences_table(rest: list, differences: dict) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for each in rest for name in differences[each.name]))
    rows = [
        [name, *(_shown(differences[each.name][name], "+") if name in differences[each.name] else "" for each in rest)]
        for name in names
    ]
    return ["score", *(each.name for each in rest)], rows


def _shown(interval: Interval, sign: str = "") -> str:
    return "{} [{}, {}]".format(*(format(value, f"{sign}.4g") for value in interval))


def _describe(report: Report, results: list, about: dict[str, Any]) -> None:
    """The models and the data."""
    report.heading("Models")
    keys = ("kind", "place", "base", "revision", "peft_type", "mask")
    rows = [[each.name, *(str(each.about.get(key) or "") for key in keys)] for each in results]
    report.table(["model", *keys], rows)
    report.heading("Data")
    rows = []
    for each in results:
        for name, data in each.scores.about.items():
            left_out = "; ".join(f"{count}: {reason}" for reason, count in data["left_out"].items())
            cells = [name, each.name, str(data["rows"]), str(data["scored"]), left_out, data["sha256"][:16]]
            rows.append(cells)
    if rows:
        report.table(["data", "model", "rows", "scored", "left out", "SHA-256"], rows)
    for name, text in about["retention"].items():
        report.text(f"General text {name}: {text['tokens']} tokens, SHA-256 of their ids {text['sha256']}.")
    for task, found in results[0].tasks.items():
        shots = f"{found['num_fewshot']} examples before each question"
        report.text(f"Task {task} of lm-eval, version {found['version']}: {found['rows']} rows, {shots}.")
    found = ", ".join(f"{package} {number}" for package, number in versions().items())
    report.text(f"Versions: {found}.")


def versions() -> dict[str, str]:
    """Package -> its version, as it is installed."""
    found = {"fnsft-trl": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _content(results: list, settings: EvaluationConfig, about: dict, values: dict, differences: dict) -> dict:
    """All of it as JSON values."""
    scores = {
        each.name: {
            **{
                name: {**interval.to_dict(), "rows": len(each.scores.measures[name].numbers)}
                for name, interval in values[each.name].items()
            },
            **{name: {"value": value} for name, value in each.others.items()},
        }
        for each in results
    }
    return {
        "format": "fnsft_trl.evaluation",
        "format_version": 1,
        "versions": versions(),
        "settings": vars(settings),
        "sources": about["sources"],
        "models": {each.name: each.about for each in results},
        "data": {each.name: each.scores.about for each in results},
        "retention": about["retention"],
        "tasks": {each.name: each.tasks for each in results},
        "reference": results[0].name,
        "scores": scores,
        "differences": {
            model: {name: interval.to_dict() for name, interval in of_model.items()}
            for model, of_model in differences.items()
        },
    }
