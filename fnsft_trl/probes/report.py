"""The report of a probe: verdicts, curves, dissociation and cost, as text, tables, charts and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import Report
from ..report.charts import line_chart, strip_chart
from .condition import Condition
from .config import SELECTORS
from .dissociation import Dissociation
from .found import Found, Verdict
from .probe import Probe
from .records import INTACT


_CURVES = {
    "union": ("Union of the first networks", "number of networks", "Lesion of the first m networks together."),
    "dose": ("Dose", "share of all neurons", "Lesion of the neurons of the largest |loading| in any network."),
    "preserve": ("Preservation", "share of all neurons", "All other neurons are silenced."),
    "kept": ("The networks alone", "share of all neurons", "All neurons but those of the networks are silenced."),
    "prune": (
        "Pruning with compensation",
        "share of all neurons",
        "Neurons of no network, in all layers but the first and the last, are set to their mean on the calibration "
        "text: as if they were taken away, and what they gave on average added to the bias.",
    ),
    "cut": ("Pruning without compensation", "share of all neurons", "The same neurons, set to zero."),
    "amplify": (
        "Amplification",
        "factor",
        "Activations of one network multiplied by a factor; means over the networks.",
    ),
}
_MEASURES = {
    "cross_entropy": "cross-entropy",
    "kl": "KL from the intact model",
    "exact_match": "exact match",
    "accuracy": "multiple choice",
}


def probe_report(probe: Probe, *, about: Mapping[str, Any]) -> tuple[Report, dict[str, Any]]:
    """The report of a probe, and its numbers as JSON values.

    Args:
        probe: what was found.
        about: what else is known: names of model, template and data.
    """
    found = probe.found
    report = Report("fnsft probe")
    report.text(_summary(probe, about))
    results: dict[str, Any] = {**about, "settings": vars(probe.config), "data": {}}
    for name in found.data:
        verdicts = found.verdicts(name)
        _verdicts(report, found, name, verdicts)
        curves = {curve: _curve(report, found, name, curve) for curve in _CURVES if found.of(curve)}
        results["data"][name] = {
            "tokens": found.data[name].tokens,
            "sequences": len(found.data[name].items),
            "sha256": found.data[name].sha256,
            "intact": {measure: sums.mean for measure, sums in found.measures(name, INTACT).items()},
            "full": _effects(found, name, found.of("full")[0]),
            "verdicts": [verdict.to_dict() for verdict in verdicts],
            "curves": curves,
            "neurons": _neurons(report, probe, name),
        }
    if probe.dissociation is not None:
        _dissociation(report, probe.dissociation)
    results["dissociation"] = probe.dissociation and probe.dissociation.to_dict()
    results["cost"] = _cost(report, probe)
    return report, results


def save_probe(probe: Probe, output: Path, *, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report, `results.json`, and one JSON line for each condition (`conditions.jsonl`).

    Returns:
        What stands in `results.json`.

    Raises:
        FNSFTError: the disk does not take it.
    """
    report, results = probe_report(probe, about=about)
    lines = [
        json.dumps({"data": name, **condition.to_dict(), **_effects(probe.found, name, condition)}) + "\n"
        for name in probe.found.data
        for condition in probe.found.conditions
    ]
    report.save(output, results, beside={"conditions.jsonl": "".join(lines)})
    return results


def verdict_table(found: Found, name: str, verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """The verdicts on a dataset, with the effects of the networks and their controls."""
    measures = [m for m in found.measures(name, INTACT) if m != "cross_entropy"]
    controls = list(verdicts[0].comparisons)
    header = ["network", "verdict", "neurons", "rise (nats)", "of full", *(_MEASURES[m] for m in measures)]
    is_continued = found.degenerate(name, INTACT) is not None
    header += [*(["degenerate"] if is_continued else []), *(SELECTORS[control] for control in controls)]
    rows = []
    for verdict in verdicts:
        (condition,) = found.of("lesion", selector="networks", network=verdict.network)
        row = [verdict.network, verdict.words, str(condition.mask.count)]
        row += [_interval(verdict.effect), _share(verdict.share)]
        row += [f"{found.effect(name, condition.key, measure):+.3f}" for measure in measures]
        row += [f"{found.degenerate(name, condition.key):.0%}"] if is_continued else []
        rows.append([*row, *(_compared(verdict.comparisons[control]) for control in controls)])
    return header, rows


def _summary(probe: Probe, about: Mapping[str, Any]) -> str:
    found, config = probe.found, probe.config
    sizes = [f"{part.name}: {part.tokens} tokens in {len(part.items)} sequences" for part in found.data.values()]
    where = "at the tokens of answers" if config.tokens == "answer" else "at all tokens"
    how = {"zero": "set to zero", "mean": "set to their mean", "resample": "set to what they are at other tokens"}
    return (
        f"{len(probe.networks)} networks of {about.get('template')} in {about.get('model')}. Scored on "
        f"{'; '.join(sizes)}. Silenced neurons are {how[config.ablation]}, {where}.{_beside(probe)}"
    )


def _beside(probe: Probe) -> str:
    """What lesions are compared with."""
    if not probe.config.has_lesions:
        return ""
    return (
        f" Each network is compared with {probe.config.draws} draws of random neurons and of neurons of the same "
        "amplitude, and with fewer of other controls, all with as many neurons in every layer. Intervals: 95%, by a "
        "bootstrap over sequences (and draws, where controls are compared). p: by the standardised effects of the "
        "draws of all networks, adjusted by Holm over the networks. A cell of a control shows the mean of its draws "
        "and, in brackets, the highest."
        + ("" if probe.found.of("lesion", selector="surrogate") else " There are no surrogate networks beside them.")
    )


def _verdicts(report: Report, found: Found, name: str, verdicts: Sequence[Verdict]) -> None:
    intact = found.measures(name, INTACT)
    values = ", ".join(f"{_MEASURES[m]} {sums.mean:.3f}" for m, sums in intact.items() if m != "kl")
    degenerate = found.degenerate(name, INTACT)
    values += "" if degenerate is None else f", degenerate {degenerate:.0%} of {len(found.data[name].prompts)} prompts"
    report.heading(f"Lesions on {name}" if verdicts else f"The model on {name}")
    report.text(
        f"The intact model: {values}. A lesion of all neurons raises the cross-entropy by {found.full(name):.2f} nats."
    )
    if not verdicts:
        return
    report.table(*verdict_table(found, name, verdicts))
    rows = []
    for verdict in verdicts:
        drawn = {
            SELECTORS[selector]: [found.effect(name, c.key) for c in chosen]
            for selector in ("random", "rms_matched")
            if (chosen := found.of("lesion", selector=selector, network=verdict.network))
        }
        rows.append((verdict.network, tuple(verdict.effect), drawn))
    chart = strip_chart(rows, x="rise of the cross-entropy (nats per token)")
    report.figure(
        f"lesions-{_file(name)}", chart, f"The lesion of each network beside draws of its controls, on {name}"
    )


def _curve(report: Report, found: Found, name: str, curve: str) -> list[dict[str, Any]]:
    """A curve as table and chart; its points as JSON values."""
    title, x, caption = _CURVES[curve]
    conditions = found.of(curve)
    points = sorted({condition.point for condition in conditions})
    selectors = list(dict.fromkeys(condition.selector for condition in conditions))
    lines: dict[str, list[tuple[float, float]]] = {SELECTORS[selector]: [] for selector in selectors}
    rows, known = [], []
    for point in points:
        row = [f"{100 * point:g}%" if "share" in x else f"{point:g}"]
        for selector in selectors:
            chosen = [c for c in conditions if c.point == point and c.selector == selector]
            effects = [found.effect(name, condition.key) for condition in chosen]
            mean = sum(effects) / len(effects) if effects else None
            if mean is not None:
                lines[SELECTORS[selector]].append((point, mean))
            row.append("" if mean is None else f"{mean:.3f} ({len(effects)})")
        rows.append(row)
        known += [{**c.to_dict(), **_effects(found, name, c)} for c in conditions if c.point == point]
    if curve == "preserve":
        rows.append(["100%", "0.000 (nothing is silenced)", *[""] * (len(selectors) - 1)])
        lines[SELECTORS["networks"]].append((1.0, 0.0))
    report.heading(f"{title}, {name}")
    report.text(f"{caption} Rise of the cross-entropy in nats; in brackets over how many masks it is a mean.")
    report.table([x, *(SELECTORS[selector] for selector in selectors)], rows)
    shares = "share" in x
    if len(points) > 1:
        chart = line_chart(lines, x=x, y="rise (nats)", is_logarithmic=curve != "union", is_share=shares)
        report.figure(f"{curve}-{_file(name)}", chart, f"{title}, on {name}")
    return known


def _effects(found: Found, name: str, condition: Condition) -> dict[str, Any]:
    """What a condition does to every measure, as JSON values."""
    effects = {measure: found.effect(name, condition.key, measure) for measure in found.measures(name, INTACT)}
    effects["share_of_full"] = found.share_of_full(name, effects["cross_entropy"])
    degenerate = found.degenerate(name, condition.key)
    return effects if degenerate is None else effects | {"degenerate": degenerate}


def _neurons(report: Report, probe: Probe, name: str) -> list[dict[str, Any]]:
    found, known = probe.found, []
    for each in probe.singles:
        (condition,) = found.of("neuron", network=each.label)
        value = found.effect(name, condition.key)
        known.append(
            {"layer": each.layer, "neuron": each.neuron, "estimate": each.estimate, "rise": value}
            | {"networks": [n.label for n in probe.networks if bool(n.mask.layers[each.layer][each.neuron])]}
        )
    if known:
        known.sort(key=lambda entry: -entry["rise"])
        report.heading(f"Single neurons, {name}")
        report.text(
            f"The {len(known)} neurons of the largest first-order effect on all data, by the rise of the "
            "cross-entropy that their own lesion does."
        )
        report.table(
            ["neuron", "rise (nats)", "first order", "in networks"],
            [
                [f"{e['layer']}:{e['neuron']}", f"{e['rise']:+.4f}", f"{e['estimate']:+.4f}", ", ".join(e["networks"])]
                for e in known
            ],
        )
    return known


def _dissociation(report: Report, found: Dissociation) -> None:
    report.heading("Double dissociation")
    together = "" if found.together is None else f" All networks together: p = {found.together:.3g}."
    report.text(
        "The damage of each network over that of its random masks, as a share of the full lesion's on the same data; "
        "p: that it hurts its own domain no more than the others, by permuting sequences, adjusted by Holm." + together
    )
    rows = [
        [
            label,
            *(
                f"{value:+.2%}" + (" (own)" if name == found.own[label] else "")
                for name, value in zip(found.data, values, strict=True)
            ),
            f"{found.advantage[label]:+.2%}",
            f"{found.p[label]:.3g}",
        ]
        for label, values in found.shares.items()
    ]
    report.table(["network", *found.data, "own less others", "p"], rows)


def _cost(report: Report, probe: Probe) -> dict[str, Any]:
    cost = probe.found.records.cost()
    report.heading("Cost")
    text = (
        f"{cost['passes']} passes of a batch took {cost['seconds'] / 60:.1f} minutes; they computed "
        f"{cost['layers']:.0%} of the layers: those before the first that a mask changes are computed once for all."
    )
    if not probe.shares_prefix:
        text = f"{cost['passes']} passes took {cost['seconds'] / 60:.1f} minutes; this model's layers can't be shared."
    if "saving" in cost:
        text += (
            f" Passes that were run both ways: {cost['seconds_whole']:.2f} s whole, {cost['seconds_begun']:.2f} s "
            f"from the first changed layer on, {cost['saving']:.2f} times as fast."
        )
    report.text(text)
    return cost


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _interval(value) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _compared(found) -> str:
    """Mean and highest of a control, and how a network stands beside it."""
    beside = f"{found.mean:+.3f}" + (f" ({found.highest:+.3f})" if found.draws > 1 else "")
    if found.adjusted is not None:
        beside += f", p {found.adjusted:.3f}"
    return beside


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
