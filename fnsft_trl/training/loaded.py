"""A template that was loaded: what a config asks of it is applied where no discovery is needed, or else checked."""

from dataclasses import fields
from typing import Any

from torch import nn
from transformers.utils import logging

from ..config import RANDOM_SELECTORS, FunctionalNetworkConfig
from ..errors import FNSFTError
from ..hub.names import absolute_sources, source_names
from ..neurons.mask import NeuronMask
from ..neurons.sites import find_neuron_sites
from ..ranges import format_ranges
from ..selection.evidence import SelectorEvidence
from ..selection.select import select_neurons
from ..template.template import FunctionalNetworkTemplate


logger = logging.get_logger(__name__)

_DEFAULTS = {f.name: f.default for f in fields(FunctionalNetworkConfig)}


def given_template(config: FunctionalNetworkConfig, given) -> FunctionalNetworkTemplate | None:
    """The template that was given to the trainer or named in its config, if any."""
    if isinstance(given, FunctionalNetworkTemplate):
        return given
    reference = given if given is not None else config.ica_template_path
    if reference is None:
        return None
    return FunctionalNetworkTemplate.from_pretrained(reference, revision=config.ica_template_revision)


def check_settings(config: FunctionalNetworkConfig, template: FunctionalNetworkTemplate) -> FunctionalNetworkTemplate:
    """The template, checked against the config, with the threshold that it asks for. No model is needed.

    Raises:
        FNSFTError: it is of another site; or a setting of the discovery is given that it was not made with.
    """
    if template.site != config.ica_site:
        raise FNSFTError(f"the template was made at {template.site}; set ica_site={template.site}")
    _check_made_with(config, template)
    rule = config.threshold_rule()
    if rule is not None and template.threshold is None:
        logger.warning(
            "the template lists its neurons, so ica_threshold, ica_percentile and ica_zscore have no effect"
        )
        return template
    return template if rule is None else template.with_threshold(rule)


def chosen_layers(
    config: FunctionalNetworkConfig, model: nn.Module, template: FunctionalNetworkTemplate
) -> list[int] | None:
    """The layers of a template that `ica_layers` leaves for the selection; `None` for all of them.

    Raises:
        FNSFTError: the template does not cover one of them.
    """
    if config.ica_layers == "all":
        return None
    layers = [site.layer for site in find_neuron_sites(model, kind=template.site, layers=config.ica_layers)]
    if missing := [layer for layer in layers if layer not in template.widths]:
        raise FNSFTError(
            f"ica_layers is {config.ica_layers}, but the template covers layers {format_ranges(template.widths)} and "
            f"knows nothing of layer {format_ranges(missing)}; name layers of the template, or discover the networks "
            "again"
        )
    return None if len(layers) == len(template.widths) else layers


def select_as_configured(
    config: FunctionalNetworkConfig,
    template: FunctionalNetworkTemplate,
    layers: list[int] | None,
    evidence: SelectorEvidence | None = None,
) -> NeuronMask:
    """The neurons that a config selects.

    Args:
        layers: of the template, to select in; `None` for all of them.
        evidence: of selectors that are measured on texts.
    """
    return select_neurons(
        template,
        config.ica_component_ids,
        selector=config.ica_select,
        fraction=config.ica_fraction,
        rank=config.ica_rank_by,
        min_reliability=config.ica_min_reliability,
        seed=config.ica_seed,
        layers=layers,
        evidence=evidence,
    )


def _check_made_with(config: FunctionalNetworkConfig, template: FunctionalNetworkTemplate) -> None:
    """Refuse settings of a discovery that are given, and not those that the template was made with."""
    known, unknown = _made_with(template), []
    for name, value in _given(config).items():
        if name not in known:
            unknown.append(name)
        elif value != known[name]:
            shown = f"{value!r}, but the template was made with {known[name]!r}"
            raise FNSFTError(
                f"{name} is {shown}; drop {name}, or discover the networks again (without ica_template_path)"
            )
    if unknown:
        logger.warning(f"no effect with a template, which does not say what it was made with: {', '.join(unknown)}")


def _given(config: FunctionalNetworkConfig) -> dict[str, Any]:
    """The settings of the discovery that differ from their defaults, but for those that a loaded template heeds."""
    heeded = {"ica_layers"}
    if config.ica_select in RANDOM_SELECTORS:
        heeded.add("ica_seed")
    settings = config.discovery_settings()
    given = {name: value for name, value in settings.items() if value != _DEFAULTS[name] and name not in heeded}
    if config.ica_datasets and config.ica_select != "gradient_conflict":  # which compares with any text
        given["ica_datasets"] = sorted(source_names(absolute_sources(config.ica_datasets)))
    return _comparable(given)


def _made_with(template: FunctionalNetworkTemplate) -> dict[str, Any]:
    """The settings that a template was made with, as far as it says so."""
    known = {**template.settings, "ica_components": len(template.components)}
    if template.settings:  # older templates do not say what there was no choice of
        known = {"ica_decomposition": "ica", "ica_surrogate": False} | known
    if sources := template.calibration["sources"]:
        known["ica_datasets"] = sorted(sources)
    return _comparable(known)


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which two words for one thing are one."""
    return {name: "float32" if (name, value) == ("ica_dtype", "auto") else value for name, value in settings.items()}
