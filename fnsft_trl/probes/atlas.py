"""The atlas: all that is known of the networks of a template, as one page that needs nothing else. No torch.

Every text goes through Jinja's escaping; the page runs one script, whose hash its policy names, and asks for nothing.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FNSFTError
from ..hub.names import UNKNOWN
from ..json_text import WRONG_VALUES, from_json
from ..ranges import format_ranges
from ..report.charts import line_chart, strip_chart
from ..template.description import Component, TemplateDescription
from ..template.membership import members
from .config import SELECTORS
from .example_file import Examples
from .sample_file import SampleResults


if TYPE_CHECKING:
    import numpy as np

_MOST_OVERLAPS = 64  # networks up to which all pairs are shown
_COLUMNS = ("network", "neurons", "layers", "reliability", "above null", "variance", "kurtosis")
_BESIDE = {"random": "random: mean, highest", "rms_matched": "same amplitude: mean, highest"}
_CURVES = {
    "union": ("Union of the first networks", "number of networks"),
    "dose": ("Dose: the neurons of the largest |loading|", "share of all neurons"),
    "preserve": ("Preservation: all other neurons silenced", "share of all neurons"),
    "amplify": ("Activations of one network multiplied, mean over the networks", "factor"),
}


@dataclass(frozen=True)
class ProbeResults:
    """What a probe has written, as the page shows it.

    Attributes:
        results (`dict`): its `results.json`.
    """

    results: dict[str, Any]

    @classmethod
    def read(cls, directory: str | Path) -> "ProbeResults":
        """The results that lie in the directory of a probe.

        Raises:
            FNSFTError: there are none.
        """
        path = Path(directory).expanduser() / "results.json"
        try:
            found = cls(from_json(path.read_text(encoding="utf-8")))
            found.charts()
            found.rise(0)
            for part in found.results["data"].values():
                for verdict in part["verdicts"]:
                    found.verdicts(verdict["network"])
        except (OSError, *WRONG_VALUES) as error:
            raise FNSFTError(f"{path} holds no results of `fnsft probe` ({error}); give its output_dir") from error
        return found

    def verdicts(self, number: int) -> list[dict[str, str]]:
        """What is said of a network, on each dataset."""
        return [
            {"data": name, "words": f"{verdict['effect']['value']:+.3f} nats; {verdict['verdict']}"}
            for name, part in self.results["data"].items()
            for verdict in part["verdicts"]
            if verdict["network"] == str(number)
        ]

    def rise(self, number: int) -> float | None:
        """What a lesion of a network does, on the first dataset."""
        part = next(iter(self.results["data"].values()), {"verdicts": ()})
        found = [v["effect"]["value"] for v in part["verdicts"] if v["network"] == str(number)]
        return found[0] if found else None

    def charts(self) -> list[dict[str, str]]:
        """Lesions beside their controls, and the curves."""
        found = []
        for name, part in self.results["data"].items():
            rows = [
                (
                    verdict["network"],
                    tuple(verdict["effect"][end] for end in ("value", "low", "high")),
                    {
                        said: [verdict["controls"][control][end] for end in ("mean", "highest")]
                        for control, said in _BESIDE.items()
                        if control in verdict["controls"]
                    },
                )
                for verdict in part["verdicts"]
            ]
            if rows:
                chart = strip_chart(rows, x="rise of the cross-entropy (nats per token)")
                found.append({"svg": chart.decode(), "caption": f"The lesion of each network, on {name}."})
            for curve, (title, x) in _CURVES.items():
                if part["curves"].get(curve):
                    scales = {"is_logarithmic": curve != "union", "is_share": "share" in x}
                    chart = line_chart(_means(part["curves"][curve]), x=x, y="rise (nats)", **scales)
                    found.append({"svg": chart.decode(), "caption": f"{title}, on {name}."})
        return found


def atlas_html(
    description: TemplateDescription,
    loadings: Mapping[int, "np.ndarray"],
    *,
    examples: Examples | None = None,
    probe: ProbeResults | None = None,
    samples: SampleResults | None = None,
) -> str:
    """The page.

    Args:
        description: of the template.
        loadings: layer -> signed loadings, shape (components, neurons).
        examples: the texts in which its networks are most active.
        probe: what their lesions do.
        samples: in which single texts they are found.
    """
    from jinja2 import Environment

    here = files(__package__)
    script = here.joinpath("atlas.js").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(here.joinpath("atlas.html.jinja").read_text(encoding="utf-8"))
    overlaps = _overlaps(description, loadings)
    layers = sorted(description.widths)
    null = description.null and (description.null.highest or description.null.reliability)
    columns = [*_COLUMNS, *(["in texts"] if samples else []), *(["rise (nats)"] if probe else [])]
    return page.render(
        title=f"Functional networks of {description.base_model or UNKNOWN}",
        facts=_facts(description),
        columns=columns,
        networks=[
            _network(description, number, layers, overlaps[number], examples, probe, samples)
            for number in range(len(description.components))
        ],
        overlaps=[[round(float(v), 3) for v in row] for row in overlaps] if len(overlaps) <= _MOST_OVERLAPS else [],
        null=None if null is None else round(null, 2),
        null_text=_null_text(description),
        charts=probe.charts() if probe else [],
        probe_text=_probe_text(probe),
        has_examples=examples is not None,
        first_layer=layers[0],
        last_layer=layers[-1],
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(description: TemplateDescription) -> list[tuple[str, str]]:
    widths = description.widths
    return [
        ("model", f"{description.base_model or UNKNOWN} ({description.architecture})"),
        ("revision", description.revision or UNKNOWN),
        ("site", f"{description.site}: {sum(widths.values())} neurons, layers {format_ranges(sorted(widths))}"),
        ("text", description.calibration_in_words()),
        ("method", description.method_in_words()),
        ("threshold", description.threshold_in_words()),
    ]


def _network(
    description: TemplateDescription,
    number: int,
    layers: Sequence[int],
    overlaps: "np.ndarray",
    examples: Examples | None,
    probe: ProbeResults | None,
    samples: SampleResults | None,
) -> dict[str, Any]:
    """What the page shows of one network."""
    component = description.components[number]
    shares = {layer: (component.layers or {}).get(layer, 0) / description.widths[layer] for layer in layers}
    highest = max(shares.values()) or 1.0
    title = str(number) if component.name is None else f"{number}: {component.name}"
    above = description.reliability_above_null(number)
    cells = [
        _cell(number, "d"),
        _cell(component.neurons, "d"),
        _cell(len(component.layers or {}), "d"),
        _cell(component.reliability, ".2f"),
        _cell(above, ".2f"),
        _cell(component.explained_variance, ".4f"),
        _cell(component.kurtosis, ".1f"),
    ]
    cells += [_cell(samples.share(number), ".0%")] if samples else []
    cells += [_cell(probe.rise(number), "+.3f")] if probe else []
    strongest = sorted(shares, key=lambda layer: -shares[layer])[:3]
    return {
        "number": number,
        "title": title,
        "cells": cells,
        "strip": [round(value / highest, 3) for value in shares.values()],
        "bars": [
            {"value": round(value / highest, 3), "text": f"layer {layer}: {value:.1%}"}
            for layer, value in shares.items()
        ],
        "highest": f"{highest:.1%} of a layer",
        "sentence": f"{component.neurons} neurons, most in layers {', '.join(map(str, sorted(strongest)))}.",
        "reliability": None if component.reliability is None else round(min(1.0, component.reliability), 2),
        "near": ", ".join(f"network {other} ({overlaps[other]:.0%})" for other in _nearest(overlaps, number)),
        "recurrence": [*_recurrence(component), *([samples.words(number)] if samples else [])],
        "verdicts": probe.verdicts(number) if probe else [],
        "examples": [_example(example) for example in examples.networks[number]] if examples else [],
    }


def _cell(value: float | None, form: str) -> dict[str, Any]:
    return {"value": "" if value is None else value, "text": "" if value is None else format(value, form)}


def _recurrence(component: Component) -> list[str]:
    return [
        f"{'Recurs' if found['recurs'] else 'Does not recur'} in {name}: network {found['component']} there, IoU "
        f"{found['iou']:.2f}, correlation {found['correlation']:.2f}."
        for name, found in component.recurrence.items()
    ]


def _example(example) -> dict[str, Any]:
    peak = example.peak or 1.0
    tokens = [
        {
            "text": token.replace("\n", "↵"),
            "value": round(abs(value) / peak, 2),
            "sign": "p" if value >= 0 else "n",
            "told": f"{value:+.1f}",
        }
        for token, value in zip(example.tokens, example.activity, strict=True)
    ]
    return {"source": example.source, "peak": f"{example.peak:.1f}", "tokens": tokens}


def _nearest(overlaps: "np.ndarray", number: int) -> list[int]:
    """The three other networks that share most with one; of equal ones the first, on any machine."""
    order = (-overlaps).argsort(kind="stable")
    return [int(other) for other in order if other != number and overlaps[other] > 0][:3]


def _overlaps(description: TemplateDescription, loadings: Mapping[int, "np.ndarray"]) -> "np.ndarray":
    """IoU of every pair of networks, shape (networks, networks)."""
    import numpy as np

    found = []
    for number in range(len(description.components)):
        of_network = members({layer: values[number] for layer, values in loadings.items()}, description.threshold)
        found.append(np.concatenate(list(of_network.values())))
    sets = np.stack(found).astype(np.float32)
    shared = sets @ sets.T
    sizes = sets.sum(1)
    return shared / np.maximum(sizes[:, None] + sizes[None] - shared, 1)


def _null_text(description: TemplateDescription) -> str:
    null = description.null
    if null is None:
        return "What networks reach without co-activation was not measured."
    highest = "" if null.highest is None else f", at most {null.highest:.2f}"
    return (
        f"Without co-activation, as many networks have a mean reliability of {null.reliability:.2f}{highest}; above "
        "null: how far from there to 1."
    )


def _probe_text(probe: ProbeResults | None) -> str:
    if probe is None:
        return ""
    parts = [f"{name}: {part.get('tokens')} tokens" for name, part in probe.results["data"].items()]
    settings = probe.results.get("settings", {})
    return (
        f"Scored on {'; '.join(parts)}; silenced neurons are set to {settings.get('ablation')}; "
        f"{settings.get('draws')} draws of each control."
    )


def _means(points: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Control -> mean rise at each point of a curve."""
    found: dict[str, dict[float, list[float]]] = {}
    for entry in points:
        found.setdefault(entry["selector"], {}).setdefault(entry["point"], []).append(entry["cross_entropy"])
    return {
        SELECTORS[selector]: [(point, sum(values) / len(values)) for point, values in sorted(by_point.items())]
        for selector, by_point in found.items()
    }
