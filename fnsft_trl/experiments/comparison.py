"""compare_arms: the report of an experiment, as Markdown, HTML and results.json."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..evaluation.config import TASK
from ..report.figures import curves_figure
from ..report.report import Report, format_table
from ..template.storage import FIGURE_FILE
from ..template.template import FunctionalNetworkTemplate
from .arms import Arm
from .cells import check_measured
from .runner import TEMPLATES
from .summary import Cell, Estimate, differing, of_arm, of_pair


_MOST_FOR_PAIRS = 4  # arms, of which every two are compared; of more, each with the first
_LONGEST = 60  # characters of a value in a table
# What of the scores stands in the table, as far as it was measured, and how it is written there.
_SCORES = {
    "exact_match": ("exact match", ".2f"),
    "nll": ("NLL", ".2f"),
    "perplexity": ("perplexity", ".2f"),
    "bleu": ("BLEU", ".1f"),
    "rougeL": ("ROUGE-L", ".3f"),
}
_LONG = ("rows", "retention", "settings", "sources", "versions")  # of a cell, which cells.jsonl holds


def compare_arms(
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    directory: str | os.PathLike,
    *,
    title: str | None = None,
    remark: str = "",
) -> str:
    """Write `report.md`, `report.html` and `results.json`. The same cells give the same bytes.

    Args:
        arms: in the order in which they are shown.
        cells: of [`run_experiment`], of every arm for the same seeds.
        directory: that of the experiment.
        title: of the report; the task and the model by default.
        remark: is added to what the report says first.

    Returns:
        The main table and what it says, as text.

    Raises:
        FNSFTError: something that was measured is NaN or infinite.
    """
    for cell in cells:
        check_measured(cell)
    return _Page(arms, cells, Path(directory)).write(title, remark)


class _Page:
    def __init__(self, arms: Sequence[Arm], cells: Sequence[Cell], directory: Path) -> None:
        self.directory = directory
        self.cells = list(cells)
        self.of = {arm.name: [cell for cell in cells if cell["arm"] == arm.name] for arm in arms}
        self.settings = {arm.name: arm.settings for arm in arms}
        self.found = {name: of_arm(own) for name, own in self.of.items()}
        self.seeds = [cell["seed"] for cell in self.of[arms[0].name]]
        self.first = cells[0]
        self.series = [name for name, text in self.first["points"][-1]["retention"].items() if "rise" in text]

    def write(self, title: str | None, remark: str) -> str:
        """Write it, and give its main part as text."""
        model = self.first["settings"].get("model_name_or_path", "")
        report = Report(title or f"Experiment: {self.first['task']}" + (f" on {model}" if model else ""))
        verdict = " ".join(filter(None, (self._verdict(), remark)))
        report.text(verdict)
        report.heading("What was learnt and what was forgotten")
        header, rows = self._table()
        report.table(header, rows)
        report.text(self._note())
        for cell in self.cells:
            if cell["budget"] is not None:
                report.text(f"Budget of retention, {cell['arm']}, seed {cell['seed']}: {cell['budget']}.")
        for name in self.series:
            report.figure(f"learning_and_forgetting_{name}", self._figure(name), self._caption(name))
        pairs = self._pairs(report)
        differences = self._differences(report)
        networks = self._networks(report)
        self._data(report)
        report.save(self.directory, self._results(pairs, differences) | {"networks": networks})
        return f"\n{format_table(header, rows)}\n\n{self._note()}\n\n{verdict}\n"

    def _verdict(self) -> str:
        best = min(self.found, key=lambda name: self.found[name]["nll"].value)
        said = f"Learnt best: {best} (NLL {self.found[best]['nll'].value:.2f})."
        for series in self.series:
            rises = {name: found["retention"][series]["rise"].value for name, found in self.found.items()}
            least = min(rises, key=rises.get)
            said += f" Forgot least of {series}: {least} ({rises[least]:+.4f} nats per token)."
        return said + " Arms that do not learn equally well cannot be compared by forgetting alone."

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """The arms, below the model before training."""
        kls = list(self.first["points"][-1]["retention"])
        is_masked = any(found["masked_nll"] for found in self.found.values())
        also = list(dict.fromkeys(key for cell in self.cells for key in cell["also"]))
        header = ["arm", "trained parameters", "neurons trained", *(key.replace("_", " ") for key in also)]
        scores = {name: form for name, form in _SCORES.items() if name in self.found[self.first["arm"]]}
        header += [name for name, _ in scores.values()] + (["NLL under its mask"] if is_masked else [])
        header += [f"{name}: rise" for name in self.series] + [f"{name}: KL" for name in kls]
        base = self.first["points"][0]
        empty = [""] * (2 + len(also))
        known = [format(base[name], form) if name in base else "" for name, (_, form) in scores.items()]
        before = ["before training", *empty, *known, *([""] if is_masked else [])]
        rows = [[*before, *[""] * (len(self.series) + len(kls))]]
        for name, found in self.found.items():
            row = [name, *_trained(self.of[name]), *(_several(self.of[name], key) for key in also)]
            row += [_shown(found[score], form) for score, (_, form) in scores.items()]
            row += [_shown(found["masked_nll"], ".2f")] if is_masked else []
            row += [_shown(found["retention"][series]["rise"], "+.4f") for series in self.series]
            row += [_shown(found["retention"][series]["kl"], ".4f") for series in kls]
            rows.append(row)
        return header, rows

    def _note(self) -> str:
        scored, count = self.first["scored"], len(self.seeds)
        unit = "nats per answer" if scored["answers"] else "nats per token"
        named = {TASK: "the prompts of the task"}
        texts = " and ".join(
            f"{text['tokens']:,} tokens of {named.get(name, name)}" for name, text in self.first["retention"].items()
        )
        if count > 1:
            intervals = f"Means over n = {count} seeds, with 95% intervals over them (Student's t)."
        else:
            intervals = (
                "One seed, so nothing is known of what another seed would give; the 95% intervals of rises are over "
                "texts (bootstrap)."
            )
        return (
            f"n = {scored['rows']} rows that were held out, and {texts}. {intervals} NLL: {unit} (lower is better). "
            "Rise: of the cross-entropy on general text; KL: of the model before training to the trained "
            "one; both in nats per token, without forward masks, as the saved model runs."
        )

    def _figure(self, series: str) -> bytes:
        curves = {}
        for name, cells in self.of.items():
            curves[name] = [
                [(point["learning"], point["retention"][series]["rise"]) for point in cell["points"][1:]]
                for cell in cells
            ]
        return curves_figure(
            curves,
            learning="NLL of held-out rows, nats (left: learnt better)",
            forgetting=f"rise of cross-entropy on {series}\nnats per token (down: forgot less)",
        )

    def _caption(self, series: str) -> str:
        return (
            f"Learning against forgetting of {series}: a line for each seed ({len(self.seeds)}) through its "
            "evaluations, its end marked; before training the NLL was "
            f"{self.first['points'][0]['learning']:.2f}."
        )

    def _pairs(self, report: Report) -> list[dict[str, Any]]:
        names = list(self.of)
        pairs = [(names[0], name) for name in names[1:]]
        if len(names) <= _MOST_FOR_PAIRS:
            pairs = list(combinations(names, 2))
        if not pairs:
            return []
        found = [(a, b, of_pair(self.of[a], self.of[b])) for a, b in pairs]
        measures = list(dict.fromkeys(name for _, _, differences in found for name in differences))
        report.heading("Differences between arms")
        rows = [
            [f"{b} - {a}", *(_shown(differences.get(name), "+.4f") for name in measures)]
            for a, b, differences in found
        ]
        report.table(["", *(_SCORES[name][0] if name in _SCORES else name for name in measures)], rows)
        over = "seeds, paired" if len(self.seeds) > 1 else "rows or texts, paired (not over seeds: there is one)"
        report.text(f"95% intervals over {over}. What is empty was not measured on the same rows.")
        return [{"of": b, "less": a, **_plain(differences)} for a, b, differences in found]

    def _differences(self, report: Report) -> dict[str, dict[str, Any]]:
        found = differing(self.settings)
        report.heading("What differs between the arms")
        if not found:
            report.text("Nothing in what was asked for.")
            return found
        rows = [[f"`{option}`", *(_value(values, name) for name in self.of)] for option, values in found.items()]
        report.table(["option", *self.of], rows)
        report.text("All other options are the same; - means that it was not given.")
        return found

    def _networks(self, report: Report) -> list[dict[str, Any]]:
        """The networks that arms share, and what they were found on."""
        found = []
        folders = list(dict.fromkeys(cell["template"] for cell in self.cells if cell["template"] is not None))
        for number, folder in enumerate(folders, 1):
            if number == 1:
                report.heading("The networks")
            path = self.directory / TEMPLATES / folder
            template = FunctionalNetworkTemplate.from_pretrained(path)
            name = "networks" if len(folders) == 1 else f"networks_{number}"
            found.append({"directory": f"{TEMPLATES}/{folder}", **template.calibration})
            null = f" ({template.null['highest']:.2f})" if template.null else ""
            report.figure(
                name,
                (path / FIGURE_FILE).read_bytes(),
                f"{len(template.components)} networks of {template.base_model} from {template.calibration['tokens']} "
                f"tokens of {', '.join(template.calibration['sources'])}; SHA-256 of the token ids "
                f"{template.calibration['sha256']}. Reliability: correlation of a network's loadings between two "
                "disjoint halves of the tokens; above null: how far it is from the highest that components reach "
                f"without any co-activation{null} to 1.",
            )
        return found

    def _data(self, report: Report) -> None:
        report.heading("Data, seeds and versions")
        first = self.first
        rows = [["seeds", ", ".join(map(str, self.seeds))], ["device", first["device"]]]
        rows += [["weights", ", ".join(first["dtype"])]]
        for seed in self.seeds:
            of_seed = [cell for cell in self.cells if cell["seed"] == seed]
            for key, what in (("train_data", "training rows"), ("eval_data", "held-out rows")):
                values = list(dict.fromkeys(str(cell[key]) for cell in of_seed))
                rows.append([f"{what}, seed {seed}", "; ".join(values)])
                if len(values) > 1:
                    rows[-1][1] += " (not the same for all arms)"
        rows += [[f"retention text {name}", f"SHA-256 {text['sha256']}"] for name, text in first["retention"].items()]
        rows += [[path, f"SHA-256 {sha256}"] for path, sha256 in first["sources"].items()]
        rows += [[name, version] for name, version in first["versions"].items()]
        report.table(["", ""], rows)

    def _results(self, pairs: list[dict[str, Any]], differences: dict[str, Any]) -> dict[str, Any]:
        first = self.first
        return {
            "task": first["task"],
            "model": first["settings"].get("model_name_or_path"),
            "seeds": self.seeds,
            "before": first["points"][0],
            "arms": [
                {"arm": name, "trained": self.of[name][0]["trained"], **_plain(found)}
                for name, found in self.found.items()
            ],
            "pairs": pairs,
            "differing": differences,
            "cells": [{key: value for key, value in cell.items() if key not in _LONG} for cell in self.cells],
            "retention": {
                name: {key: text[key] for key in ("tokens", "sha256", "kl")}
                for name, text in first["retention"].items()
            },
            "sources": first["sources"],
            "versions": first["versions"],
        }


def _trained(cells: Sequence[Cell]) -> list[str]:
    trained = cells[0]["trained"]
    neurons = trained["neurons"]
    return [f"{trained['parameters']:,}", f"{neurons['count']:,} of {neurons['of']:,}" if neurons else "not held"]


def _several(cells: Sequence[Cell], key: str) -> str:
    """What was recorded beside the scores, for all seeds."""
    words = {True: "yes", False: "NO", None: "does not apply"}
    found = []
    for cell in cells:
        value = cell["also"].get(key)
        is_word = value is None or isinstance(value, bool)
        found.append(words[value] if is_word else f"{value:,}" if isinstance(value, int) else str(value))
    return ", ".join(dict.fromkeys(found))


def _shown(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    text = format(estimate.value, form)
    if estimate.low is None:
        return text
    return f"{text} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _value(values: dict[str, Any], arm: str) -> str:
    if arm not in values:
        return "-"
    value = values[arm]
    return shorten(value if isinstance(value, str) else json.dumps(value), _LONGEST, placeholder="...")


def _plain(found: Any) -> Any:
    """Estimates as JSON values, at any depth."""
    if isinstance(found, Estimate):
        return asdict(found)
    return {key: _plain(value) for key, value in found.items()} if isinstance(found, dict) else found
