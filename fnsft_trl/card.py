"""A template's model card and its figure, made from its description alone: the same template, the same bytes."""

import re
from pathlib import PurePath
from typing import Any

import yaml

from .config import ThresholdRule
from .storage import FIGURE_FILE, UNKNOWN, describe_threshold


TAGS = ["fnsft", "functional-networks", "independent-component-analysis", "interpretability"]

_HEADER = "| network | neurons | layers | explained variance | kurtosis | reliability | overlap |\n|" + 7 * "---|"


def format_known(value: float | None, form: str) -> str:
    """A number in a format, or `unknown`."""
    return UNKNOWN if value is None else format(value, form)


def template_card(config: dict[str, Any], name: str | None = None) -> str:
    """The README of a template, with the Hub's metadata on top.

    Args:
        config: the template's description, see [`~fnsft_trl.storage.check_config`].
        name: the repository it is loaded from, where that is known.
    """
    model, calibration, components = config["base_model"] or UNKNOWN, config["calibration"], config["components"]
    rows = "\n".join(
        f"| {number} | {c['neurons']} | {len(c['layers'])} | {format_known(c['explained_variance'], '.4f')} | "
        f"{format_known(c['kurtosis'], '.1f')} | {format_known(c['reliability'], '.2f')} | "
        f"{format_known(c['jaccard'], '.2f')} |"
        for number, c in enumerate(components)
    )
    widths = config["widths"].values()
    found = f"found by independent component analysis of its activations at `{config['site']}`"
    return f"""---
{_metadata(config)}---

# Functional networks of {model}

{len(components)} groups of co-activating MLP neurons of `{model}` ({config["architecture"]}), {found}:
{sum(widths)} neurons in {len(widths)} layers. This is a template for `fnsft_trl`: it holds no weights of the model.

![The share of each layer's neurons in each network]({FIGURE_FILE})

{_HEADER}
{rows}

{_reliability(config)}

## How to use it

```python
from fnsft_trl import FunctionalNetworkTemplate, lesion, select_neurons

template = FunctionalNetworkTemplate.from_pretrained("{name or "path of this directory"}")
mask = select_neurons(template, component_ids=[0])
with lesion(model, mask):
    ...
```

To fine-tune only these neurons, name the template in a `FunctionalNetworkConfig` or in the YAML of `fnsft train`:
`ica_template_path`, and `ica_template_revision` with a commit, so that a run can be repeated.

## Where it comes from

| | |
|---|---|
| base model | {model}{_revision(config)} |
| calibration text | {_calibration(calibration)} |
| token ids, SHA-256 | {calibration["sha256"] or UNKNOWN} |
| method | {_method(config["settings"])} |
| neurons of a network | {describe_threshold(_threshold(config))} |
| made with | fnsft_trl {config["fnsft_trl_version"]} |

## What it must not be used for

- Another model. Equal shapes are not enough: other weights have other networks, and a fine-tuned model may have moved
  away from these. `fnsft compare` tells how far.
- Claims about what a network means. Networks are groups of neurons whose activations vary together on the calibration
  text; no function was tested here, and other text may give others.
- Switching a behaviour off. A lesion damages whatever else its neurons do, and a mask is no safeguard.
- Conclusions without controls: compare with random neurons and with the most active ones, as many in every layer.
"""


def _metadata(config: dict[str, Any]) -> str:
    metadata: dict[str, Any] = {"library_name": "fnsft_trl", "tags": TAGS}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config["base_model"]):
        metadata["base_model"] = config["base_model"]
    sources = [source for source in config["calibration"]["sources"] if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)]
    if datasets := [source for source in sources if not PurePath(source).suffix]:
        metadata["datasets"] = datasets
    if config["license"]:
        metadata["license"] = config["license"]
    return yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)


def _reliability(config: dict[str, Any]) -> str:
    if config["components"][0]["reliability"] is None:
        return (
            "Reliability is unknown: this template was converted from lists of neurons, which say nothing of whether "
            "the networks\nare found again on other text."
        )
    null = ""
    if config["null"] is not None:
        null = (
            "\nThe same activations shuffled in time give a reliability of "
            f"{config['null']['reliability']:.2f} and an overlap of {config['null']['jaccard']:.2f}."
        )
    return (
        "Reliability is the correlation of a network's loadings between two disjoint halves of the tokens, overlap "
        "the Jaccard\nindex of its 2% strongest neurons between them. A network for which they are low is not "
        f"expected to be found again on\nother text.{null}"
    )


def _revision(config: dict[str, Any]) -> str:
    return f", revision {config['revision']}" if config["revision"] else ""


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration["sources"]:
        return UNKNOWN
    return f"{calibration['tokens']} tokens of {', '.join(calibration['sources'])}".replace("|", "\\|")


def _method(settings: dict[str, Any]) -> str:
    if "ica_variant" not in settings:
        return UNKNOWN
    return f"{settings['ica_variant']} FastICA ({settings['ica_contrast']}), {settings['ica_standardize']}"


def _threshold(config: dict[str, Any]) -> ThresholdRule | None:
    return ThresholdRule(**config["threshold"]) if config["threshold"] else None


def networks_svg(config: dict[str, Any]) -> str:
    """The networks over the layers as a picture: the share of each layer's neurons in each network, and reliability.

    Args:
        config: the template's description.
    """
    layers, components = sorted(map(int, config["widths"])), config["components"]
    cell, left, top = 18, 70, 34
    width, height = len(layers) * cell, len(components) * cell
    shares = [
        {int(layer): count / config["widths"][layer] for layer, count in component["layers"].items()}
        for component in components
    ]
    most = max((value for share in shares for value in share.values()), default=0) or 1
    step = max(1, -(-len(layers) // 16))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="{top + height + 64}" '
        'font-family="sans-serif" font-size="11" fill="#1c2733">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left}" y="18" font-size="12">share of each layer\'s neurons in the network</text>',
        f'<text x="{left + width + 24}" y="18" font-size="12">reliability</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#f4f6f8"/>',
    ]
    for number, (component, share) in enumerate(zip(components, shares, strict=True)):
        y = top + number * cell
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{number}</text>')
        for column, layer in enumerate(layers):
            if share.get(layer):
                opacity = f"{max(0.04, share[layer] / most):.2f}"
                parts.append(
                    f'<rect x="{left + column * cell}" y="{y}" width="{cell}" height="{cell}" fill="#4b2e83" '
                    f'fill-opacity="{opacity}"><title>network {number}, layer {layer}: {share[layer]:.1%}</title>'
                    "</rect>"
                )
        if component["reliability"] is not None:
            length = round(100 * min(1, component["reliability"]))
            parts.append(
                f'<rect x="{left + width + 24}" y="{y + 4}" width="{length}" height="10" fill="#3b6ea5">'
                f"<title>{component['reliability']:.2f}</title></rect>"
            )
    for column in range(0, len(layers), step):
        x = left + column * cell + cell // 2
        parts.append(f'<text x="{x}" y="{top + height + 15}" text-anchor="middle">{layers[column]}</text>')
    parts += [
        f'<text x="{left + width // 2}" y="{top + height + 34}" text-anchor="middle">layer</text>',
        f'<text x="8" y="{top + height // 2}">network</text>',
        f'<text x="{left}" y="{top + height + 54}">darkest: {most:.1%} of a layer</text>',
        *(
            f'<text x="{left + width + 24 + 100 * value}" y="{top + height + 15}" text-anchor="middle">{value}</text>'
            for value in (0, 1)
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)
