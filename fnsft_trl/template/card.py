"""The model card of a template, made from its description alone."""

import re
from typing import Any

from ..hub.card import TAGS, card_text, plain
from ..hub.names import UNKNOWN, is_dataset_id
from .description import Component, TemplateDescription
from .storage import FIGURE_FILE


_HEADER = (
    "| network | neurons | layers | explained variance | kurtosis | reliability | above null | overlap |\n|"
    + 8 * "---|"
)


def format_known(value: float | None, form: str) -> str:
    """A number in a format, or `unknown`."""
    return UNKNOWN if value is None else format(value, form)


def called(number: int, component: Component) -> str:
    """A network by its number, and by the name that a person gave it."""
    return str(number) if component.name is None else f"{number} ({plain(component.name)})"


def template_card(description: TemplateDescription, name: str | None = None) -> str:
    """The README of a template, with the Hub's metadata on top.

    Args:
        description: of the template.
        name: the repository it is loaded from, where that is known.
    """
    model, components = description.base_model or UNKNOWN, description.components
    rows = "\n".join(
        f"| {called(number, c)} | {c.neurons} | {len(c.layers)} | {format_known(c.explained_variance, '.4f')} | "
        f"{format_known(c.kurtosis, '.1f')} | {format_known(c.reliability, '.2f')} | "
        f"{format_known(description.reliability_above_null(number), '.2f')} | {format_known(c.jaccard, '.2f')} |"
        for number, c in enumerate(components)
    )
    widths = description.widths.values()
    found = f"found by independent component analysis of its activations at `{description.site}`"
    body = f"""
# Functional networks of {plain(model)}

{len(components)} groups of co-activating MLP neurons of `{model}` ({description.architecture}), {found}:
{sum(widths)} neurons in {len(widths)} layers. This is a template for `fnsft_trl`: it holds no weights of the model.

![The share of each layer's neurons in each network]({FIGURE_FILE})

{_HEADER}
{rows}

{_reliability(description)}
{_recurrence(description)}
## How to use it

```python
{_code(description, name)}
```

To fine-tune only these neurons, name the template in a `FunctionalNetworkConfig` or in the YAML of `fnsft train`:
`ica_template_path`, and `ica_template_revision` with a commit, so that a run can be repeated.

## Where it comes from

| | |
|---|---|
| base model | {plain(model + _revision(description))} |
| calibration text | {plain(description.calibration_in_words())} |
| token ids, SHA-256 | {description.calibration.sha256 or UNKNOWN} |
| method | {plain(description.method_in_words())} |
| neurons of a network | {plain(description.threshold_in_words())} |
| made with | fnsft_trl {plain(description.fnsft_trl_version)} |

## What it must not be used for

- Another model. Equal shapes are not enough: other weights have other networks, and a fine-tuned model may have moved
  away from these. `fnsft compare` tells how far.
- Claims about what a network means. Networks are groups of neurons whose activations vary together on the calibration
  text; no function was tested here, and other text may give others.
- Switching a behaviour off. A lesion damages whatever else its neurons do, and a mask is no safeguard.
- Conclusions without controls: compare with random neurons and with the most active ones, as many in every layer.
"""
    return card_text(_metadata(description), body)


def _metadata(description: TemplateDescription) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "fnsft_trl", "tags": TAGS}
    if _is_model_id(description.base_model):
        metadata["base_model"] = description.base_model
    if datasets := [source for source in description.calibration.sources if is_dataset_id(source)]:
        metadata["datasets"] = datasets
    if description.license:
        metadata["license"] = description.license
    return metadata


def _reliability(description: TemplateDescription) -> str:
    if description.components[0].reliability is None:
        return (
            "Reliability is unknown: this template was converted from lists of neurons, which say nothing of whether "
            "the networks\nare found again on other text."
        )
    null = ""
    if description.null is not None:
        null = (
            "\nThe same activations shuffled in time give a reliability of "
            f"{description.null.reliability:.2f} and an overlap of {description.null.jaccard:.2f}, which is chance."
        )
    if description.settings.get("ica_standardize") in ("center", "layer"):
        null += (
            " Judge these\nnetworks by their overlap: where neurons keep their scale, a few of large variance give a "
            "high reliability\nwithout any co-activation."
        )
    return (
        "Reliability is the correlation of a network's loadings between two disjoint halves of the tokens, overlap "
        "the Jaccard\nindex of its 2% strongest neurons between them. A network for which they are low is not "
        f"expected to be found again on\nother text.{null}"
    )


def _recurrence(description: TemplateDescription) -> str:
    """In which datasets of several each network is found again; empty for a template of one."""
    components = description.components
    sources = list(components[0].recurrence)
    if not sources:
        return ""
    rows = []
    for number, component in enumerate(components):
        found = [component.recurrence[source] for source in sources if source in component.recurrence]
        cells = [f"{f['iou']:.2f}{' (recurs)' if f['recurs'] else ''}" for f in found]
        rows.append(f"| {' | '.join([str(number), *cells])} |")
    header = f"| network | {' | '.join(map(plain, sources))} |\n|{'---|' * (1 + len(sources))}"
    told = "Overlap (IoU) of each network with its counterpart in each dataset alone; above 0.2 it counts as the same:"
    return "\n".join(["", told, "", header, *rows, ""])


def _revision(description: TemplateDescription) -> str:
    return f", revision {description.revision}" if description.revision else ""


def _code(description: TemplateDescription, name: str | None) -> str:
    """How to load and use the template."""
    model, revision = "path of the base model", ""
    where = name if name is not None and _is_model_id(name) else "path of this directory"
    if _is_model_id(description.base_model):
        model = description.base_model
        if re.fullmatch("[0-9a-f]{40}", description.revision or ""):
            revision = f', revision="{description.revision}"'
    lines = [
        "from fnsft_trl import FunctionalNetworkTemplate, lesion, select_neurons",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{model}"{revision})',
        f'template = FunctionalNetworkTemplate.from_pretrained("{where}")',
        "mask = select_neurons(template, component_ids=[0])",
        "with lesion(model, mask):",
        "    ...",
    ]
    return "\n".join(lines)


def _is_model_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
