"""TemplateDescription: all that a template says of itself without its tensors, as in its `config.json`. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import ThresholdRule
from ..hub.names import UNKNOWN, clean_model_name, source_names
from .schema import FORMAT, FORMAT_VERSION, PLAIN_VERSION, check_config, signed


SIDES = ("basis", "input_basis")  # of an MLP, of whose inputs a template may hold directions

_STATISTICS = ("mean", "rms")


@dataclass
class Component:
    """What is known of one network.

    Attributes:
        explained_variance (`float` or `None`): share of the activations' variance, in [0, 1]; `None` where unknown.
        kurtosis (`float` or `None`): excess kurtosis of the component.
        reliability (`float` or `None`): |correlation| of its loadings between two disjoint halves of the tokens, in
            [0, 1].
        jaccard (`float` or `None`): overlap of its 2% largest |loadings| between the halves, in [0, 1].
        neurons (`int`): number of neurons over the threshold.
        layers (`dict[int, int]`): number of them in each layer that has any.
        recurrence (`dict[str, dict]`): in a template of several datasets: dataset -> where the network is found among
            that dataset's own, see [`~fnsft_trl.discovery.recurrence.recurrence`].
        name (`str` or `None`): what a person called it.
    """

    explained_variance: float | None
    kurtosis: float | None
    reliability: float | None
    jaccard: float | None
    neurons: int = 0
    layers: dict[int, int] | None = None
    recurrence: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Mean `reliability` of the networks on the first `tokens` tokens, and mean `above_null`; in [0, 1].

    `above_null` is `None` where an older version did not measure it.
    """

    tokens: int
    reliability: float
    above_null: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The text that networks were found on.

    Attributes:
        sources (`tuple[str, ...]`): names of datasets, no paths.
        tokens (`int`): how many.
        sha256 (`str` or `None`): of the token ids.
        curve (`tuple[CurvePoint, ...]`): reliability over tokens; empty where it was not measured.
    """

    sources: tuple[str, ...]
    tokens: int
    sha256: str | None
    curve: tuple[CurvePoint, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """Of a mapping that was checked."""
        curve = tuple(
            CurvePoint(point["tokens"], point["reliability"], point.get("above_null"))
            for point in value.get("curve", ())
        )
        return cls(tuple(value["sources"]), value["tokens"], value["sha256"], curve)

    def to_json(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        curve = {"curve": [_known(point) for point in self.curve]} if self.curve else {}
        return {"sources": list(self.sources), "tokens": self.tokens, "sha256": self.sha256, **curve}


@dataclass(frozen=True)
class NullReliability:
    """What components are without co-activation: mean `reliability` and `jaccard`, and the `highest` reliability of
    one of them; in [0, 1]. `highest` is `None` where an older version did not measure it."""

    reliability: float
    jaccard: float
    highest: float | None = None


def reliability_above_null(reliability: float | None, null: NullReliability | None) -> float | None:
    """Reliability against its null, by which networks are shown and chosen: (reliability - null) / (1 - null).

    The null is the highest reliability that one of as many components reaches without any co-activation (of a template
    that does not know it, their mean).

    Args:
        reliability: of a network.
        null: of its template.

    Returns:
        0 where the network is no more reliable than by chance, 1 where its loadings are the same in both halves;
        `None` where one of the two is unknown.
    """
    if reliability is None or null is None:
        return None
    chance = null.reliability if null.highest is None else null.highest
    above = 0.0 if chance >= 1 else (reliability - chance) / (1 - chance)
    return min(max(above, 0.0), 1.0)  # which in this order gives NaN for NaN


@dataclass(frozen=True)
class TemplateDescription:
    """What a template says of itself; its fields are those of a template where they have the same name.

    Attributes:
        widths (`dict[int, int]`): number of neurons of every layer.
        statistics (`bool`): whether mean and RMS of each neuron's activations are among the tensors.
        basis (`dict[int, list[int]]`): numbers of directions of each layer's neurons and of its MLP's input, and the
            width of that; empty where there are none.
        tensors_sha256 (`str` or `None`): of the bytes of the tensors' file.
        format_version (`int`): of the files that it was read from.
        fnsft_trl_version (`str`): of the package that made the template.
    """

    base_model: str
    revision: str | None
    architecture: str
    site: str
    license: str | None
    widths: dict[int, int]
    statistics: bool
    threshold: ThresholdRule | None
    settings: dict[str, Any]
    calibration: Calibration
    null: NullReliability | None
    weights: dict[int, dict] | None
    tensors_sha256: str | None
    components: tuple[Component, ...]
    format_version: int = PLAIN_VERSION
    fnsft_trl_version: str = __version__
    basis: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, template, tensors_sha256: str) -> TemplateDescription:
        """The description of a template.

        Args:
            template: a [`~fnsft_trl.template.template.FunctionalNetworkTemplate`].
            tensors_sha256: of the bytes of its tensors' file.

        Raises:
            FNSFTError: the template holds a value that no description may have.
        """
        components = [_component_json(component) for component in template.counted()]
        for component in components:
            found = component["recurrence"]
            component["recurrence"] = dict(zip(source_names(list(found)), found.values(), strict=True))
        config = {
            "format": FORMAT,
            "format_version": version_of(template),
            "fnsft_trl_version": __version__,
            "base_model": clean_model_name(template.base_model),
            "widths": _layer_json(template.widths),
            "statistics": bool(template.mean),
            "threshold": asdict(template.threshold) if template.threshold else None,
            "calibration": {**template.calibration, "sources": source_names(template.calibration["sources"])},
            "null": template.null,
            "weights": _layer_json(template.weights) if template.weights else None,
            "tensors_sha256": tensors_sha256,
            "basis": {
                str(layer): [len(of["basis"]), *of["input_basis"].shape] for layer, of in template.basis.items()
            },
            "components": components,
        }
        same = ("revision", "architecture", "site", "license", "settings")
        return cls.from_json(config | {name: getattr(template, name) for name in same}, Path("config.json"))

    @classmethod
    def from_json(cls, config: Any, path: Path) -> TemplateDescription:
        """Check what a `config.json` holds, of this version or an older one.

        Args:
            config: what was read.
            path: named in messages.

        Raises:
            FNSFTError: another format, a newer version, or a value that is missing or has no meaning.
        """
        config = check_config(config, path)
        plain = ("format_version", "fnsft_trl_version", "base_model", "revision", "architecture", "site", "license")
        plain += ("statistics", "settings", "tensors_sha256")
        null, weights = config["null"], config["weights"]
        return cls(
            **{name: config[name] for name in plain},
            widths=_by_layer(config["widths"]),
            threshold=ThresholdRule(**config["threshold"]) if config["threshold"] else None,
            calibration=Calibration.from_json(config["calibration"]),
            null=NullReliability(null["reliability"], null["jaccard"], null.get("highest")) if null else None,
            weights=_by_layer(weights) if weights else None,
            basis=_by_layer(config["basis"]),
            components=tuple(map(_component, config["components"])),
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "fnsft_trl_version": self.fnsft_trl_version,
            "base_model": self.base_model,
            "revision": self.revision,
            "architecture": self.architecture,
            "site": self.site,
            "license": self.license,
            "widths": _layer_json(self.widths),
            "statistics": self.statistics,
            "threshold": asdict(self.threshold) if self.threshold else None,
            "settings": self.settings,
            "calibration": self.calibration.to_json(),
            "null": _known(self.null) if self.null else None,
            "weights": _layer_json(self.weights) if self.weights else None,
            "tensors_sha256": self.tensors_sha256,
            **({"basis": _layer_json(self.basis)} if self.basis else {}),
            "components": [_component_json(component) for component in self.components],
        }

    def to_bytes(self) -> bytes:
        """The bytes of `config.json`, with a checksum of what it says."""
        return (json.dumps(signed(self.to_json()), indent=2, allow_nan=False) + "\n").encode()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that it asks for."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, width in self.widths.items():
            shapes[f"layers.{layer}.loadings"] = (len(self.components), width)
            if self.statistics:
                shapes |= {f"layers.{layer}.{part}": (width,) for part in _STATISTICS}
            if self.basis:
                of_neurons, of_input, input_width = self.basis[layer]
                shapes |= {f"layers.{layer}.basis": (of_neurons, width)}
                shapes |= {f"layers.{layer}.input_basis": (of_input, input_width)}
        return shapes

    def reliability_above_null(self, number: int) -> float | None:
        """[`reliability_above_null`] of network `number`."""
        return reliability_above_null(self.components[number].reliability, self.null)

    def threshold_in_words(self) -> str:
        """The rule by which neurons belong to a network."""
        return str(self.threshold) if self.threshold else "the neurons listed for each network"

    def calibration_in_words(self) -> str:
        """The text that the networks were found on."""
        sources = ", ".join(self.calibration.sources)
        return f"{self.calibration.tokens} tokens of {sources}" if sources else UNKNOWN

    def method_in_words(self) -> str:
        """How the networks were found."""
        settings = self.settings
        if not {"ica_variant", "ica_contrast", "ica_standardize", "ica_rank", "ica_seed"} <= set(settings):
            return UNKNOWN
        scaled = {"center": "centred", "zscore": "z-scored", "layer": "centred"}
        activations = f"{scaled.get(settings['ica_standardize'], UNKNOWN)} activations"
        if settings["ica_standardize"] == "layer":
            activations += " over the RMS of their layer"
        if settings.get("ica_surrogate"):
            activations += ", each neuron shifted in time by itself (a control)"
        backend = " of scikit-learn" if settings.get("ica_backend") == "sklearn" else ""
        how = {
            "pca": "principal components (a control)",
            "kmeans": "clusters of neurons by k-means on their principal loadings (a control)",
        }.get(
            settings.get("ica_decomposition"),
            f"{settings['ica_variant']} FastICA{backend} ({settings['ica_contrast']})",
        )
        return f"{how} of {activations}, rank {settings['ica_rank']}, seed {settings['ica_seed']}"


def version_of(template) -> int:
    """Of the format that a template is written in: the lowest that holds what it has."""
    return FORMAT_VERSION if template.basis else PLAIN_VERSION


def _known(value: CurvePoint | NullReliability) -> dict[str, Any]:
    return {name: number for name, number in asdict(value).items() if number is not None}


def _component(value: dict[str, Any]) -> Component:
    plain = ("explained_variance", "kurtosis", "reliability", "jaccard", "neurons")
    layers, recurrence = _by_layer(value["layers"]), value.get("recurrence", {})
    known = {name: value[name] for name in plain}
    return Component(**known, layers=layers, recurrence=recurrence, name=value.get("name"))


def _component_json(component: Component) -> dict[str, Any]:
    found = asdict(component) | {"layers": _layer_json(component.layers)}
    return {key: value for key, value in found.items() if key != "name" or value is not None}


def _by_layer(value: dict[str, Any]) -> dict[int, Any]:
    return {int(layer): entry for layer, entry in value.items()}


def _layer_json(value: dict[int, Any]) -> dict[str, Any]:
    return {str(layer): entry for layer, entry in value.items()}
