"""FunctionalNetworkTemplate: all networks of one model, on disk as config.json, template.safetensors and README.md.

This module does not import torch by itself, so that a template's description can be read without it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ThresholdRule
from .errors import FNSFTError


if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT = "fnsft_trl.template"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "template.safetensors"
CARD_FILE = "README.md"
_READY = ".template.ready"  # while it exists, a newer template waits beside the old one


@dataclass
class Component:
    """What is known of one network.

    Attributes:
        explained_variance (`float`): share of the activations' variance, in [0, 1].
        kurtosis (`float`): excess kurtosis of the component.
        reliability (`float`): |correlation| of its loadings between two disjoint halves of the tokens, in [0, 1].
        jaccard (`float`): overlap of its 2% largest |loadings| between the halves, in [0, 1].
        neurons (`int`): number of neurons over the threshold.
        layers (`dict[int, int]`): number of them in each layer that has any.
        recurrence (`dict[str, dict]`): in a template of several datasets: dataset -> where the network is found among
            that dataset's own, see [`~fnsft_trl.similarity.recurrence`].
    """

    explained_variance: float
    kurtosis: float
    reliability: float
    jaccard: float
    neurons: int = 0
    layers: dict[int, int] | None = None
    recurrence: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class FunctionalNetworkTemplate:
    """All networks of one model with their loadings, provenance and reliability.

    Attributes:
        base_model (`str`): the model's id or the name of its directory.
        revision (`str` or `None`): the model's commit on the Hub, when known.
        architecture (`str`): class name of the model.
        site (`str`): `"mlp_intermediate"` or `"mlp_output"`.
        settings (`dict`): every ICA setting that led here.
        calibration (`dict`): `sources`, `tokens` and `sha256` of the token ids.
        threshold (`ThresholdRule`): which neurons belong to a network.
        null (`dict[str, float]` or `None`): mean `reliability` and `jaccard` of as many components of the same
            activations shuffled in time, which those of the components are to be compared with.
        components (`list[Component]`): one entry per network.
        loadings (`dict[int, torch.Tensor]`): layer -> signed loadings, shape (components, neurons of the layer).
        mean, rms (`dict[int, torch.Tensor]`): layer -> shape (neurons of the layer,), of the activations on the
            calibration text.
    """

    base_model: str
    revision: str | None
    architecture: str
    site: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    threshold: ThresholdRule
    null: dict[str, float] | None
    components: list[Component]
    loadings: dict[int, torch.Tensor]
    mean: dict[int, torch.Tensor]
    rms: dict[int, torch.Tensor]

    def __post_init__(self) -> None:
        for number, component in enumerate(self.components):
            members = self.members(number)
            component.layers = {layer: int(m.sum()) for layer, m in members.items() if m.any()}
            component.neurons = sum(component.layers.values())

    @property
    def widths(self) -> dict[int, int]:
        """Number of neurons of each layer."""
        return {layer: values.shape[1] for layer, values in self.loadings.items()}

    def members(self, number: int) -> dict[int, torch.Tensor]:
        """The neurons of network `number`: layer -> bool tensor, shape (neurons of the layer,)."""
        import numpy as np

        loadings = {layer: values[number] for layer, values in self.loadings.items()}
        pooled = np.concatenate([values.numpy() for values in loadings.values()])  # (neurons of all layers,)
        value = self.threshold.value
        if self.threshold.rule == "percentile":
            least = float(np.percentile(np.abs(pooled), value))
            return {layer: values.abs() > least for layer, values in loadings.items()}
        if self.threshold.rule == "layer_percentile":
            return {i: v.abs() > float(np.percentile(np.abs(v.numpy()), value)) for i, v in loadings.items()}
        mean, deviation = float(pooled.mean(dtype=np.float64)), float(pooled.std(dtype=np.float64))
        above = {layer: values > mean + value * deviation for layer, values in loadings.items()}
        if self.threshold.rule == "zscore_positive":
            return above
        return {layer: above[layer] | (values < mean - value * deviation) for layer, values in loadings.items()}

    def with_threshold(self, threshold: ThresholdRule) -> FunctionalNetworkTemplate:
        """The same networks with another threshold; no discovery is needed."""
        return replace(self, threshold=threshold, components=[replace(component) for component in self.components])

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that this template was not made from.

        Raises:
            FNSFTError: the architecture, a layer or a width differs; the message names the first difference.
        """
        from .neurons import base_model, find_neuron_sites

        base = base_model(model)
        made_from = f"the template was made from {self.base_model} ({self.architecture})"
        if type(base).__name__ != self.architecture:
            raise FNSFTError(f"{made_from}, but the model is a {type(base).__name__}; use a template of this model")
        widths = {site.layer: site.width for site in find_neuron_sites(model, kind=self.site)}
        for layer, width in self.widths.items():
            if widths.get(layer) != width:
                found = f"{widths[layer]} neurons in layer {layer}" if layer in widths else f"no layer {layer}"
                raise FNSFTError(
                    f"{made_from}, with {width} neurons in layer {layer}, but the model has {found}; use a template "
                    "of this model"
                )
        name = model_name(base)
        if name and self.base_model and name != self.base_model:
            from transformers.utils import logging

            logging.get_logger(__name__).warning(
                f"{made_from}, the model is called {name}: the shapes agree, but other weights have other networks"
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `config.json`, `template.safetensors` and `README.md`.

        Whoever is interrupted leaves the old template or the new one, whole: all three are written under other names
        first, and a template found between two renames is completed before it is read.
        """
        from safetensors.torch import save

        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer in self.loadings:
            tensors[f"layers.{layer}.loadings"] = self.loadings[layer].contiguous()
            tensors[f"layers.{layer}.mean"] = self.mean[layer].contiguous()
            tensors[f"layers.{layer}.rms"] = self.rms[layer].contiguous()
        # One pair only: safetensors writes several in a random order, and the same template must be the same bytes.
        data = save(tensors, metadata={FORMAT: str(FORMAT_VERSION)})
        config = (json.dumps(self._config(), indent=2) + "\n").encode()
        (directory / _READY).unlink(missing_ok=True)
        for name, content in ((TENSOR_FILE, data), (CARD_FILE, self._card().encode()), (CONFIG_FILE, config)):
            _partial(directory, name).write_bytes(content)
        (directory / _READY).touch()
        _complete(directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> FunctionalNetworkTemplate:
        """Load a template from a local directory.

        Raises:
            FNSFTError: the directory holds no template, or one that cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_template_config(directory)
        path = Path(directory) / TENSOR_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FNSFTError(f"{path} cannot be read ({error}); save the template again") from error
        parts: dict[str, dict[int, torch.Tensor]] = {"loadings": {}, "mean": {}, "rms": {}}
        for layer, width in ((int(layer), width) for layer, width in config["widths"].items()):
            for part, values in parts.items():
                name = f"layers.{layer}.{part}"
                shape = (len(config["components"]), width) if part == "loadings" else (width,)
                if name not in tensors or tuple(tensors[name].shape) != shape:
                    found = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
                    raise FNSFTError(
                        f"{path}: {name} should have shape {shape}, found {found}; save the template again"
                    )
                values[layer] = tensors[name]
        known = {"explained_variance", "kurtosis", "reliability", "jaccard"}
        return cls(
            components=[
                Component(**{key: c[key] for key in known}, recurrence=c.get("recurrence", {}))
                for c in config["components"]
            ],
            null=config.get("null"),
            **{key: config[key] for key in ("base_model", "revision", "architecture", "site", "settings")},
            calibration=config["calibration"],
            threshold=ThresholdRule(**config["threshold"]),
            **parts,
        )

    def _config(self) -> dict[str, Any]:
        from . import __version__

        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fnsft_trl_version": __version__,
            "base_model": self.base_model,
            "revision": self.revision,
            "architecture": self.architecture,
            "site": self.site,
            "widths": self.widths,
            "threshold": asdict(self.threshold),
            "settings": self.settings,
            "calibration": self.calibration,
            "null": self.null,
            "components": [asdict(component) for component in self.components],
        }

    def _card(self) -> str:
        rows = "\n".join(
            f"| {i} | {c.neurons} | {len(c.layers)} | {c.explained_variance:.4f} | {c.kurtosis:.1f} | "
            f"{c.reliability:.2f} | {c.jaccard:.2f} |"
            for i, c in enumerate(self.components)
        )
        total = sum(self.widths.values())
        null = ""
        if self.null is not None:
            null = (
                f" The same activations shuffled in time give a reliability of {self.null['reliability']:.2f} and an "
                f"overlap of {self.null['jaccard']:.2f}."
            )
        return f"""---
library_name: fnsft_trl
tags:
- functional-networks
- fnsft
---

# Functional networks of {self.base_model}

{len(self.components)} groups of co-activating MLP neurons of `{self.base_model}` ({self.architecture}), found by
independent component analysis of its activations at `{self.site}`: {total} neurons in {len(self.widths)} layers,
{self.calibration["tokens"]} tokens of {", ".join(self.calibration["sources"])}.

| network | neurons | layers | explained variance | kurtosis | reliability | overlap |
|---|---|---|---|---|---|---|
{rows}

Reliability is the correlation of a network's loadings between two disjoint halves of the tokens, overlap the Jaccard
index of its 2% strongest neurons between them. A network for which they are low is not expected to be found again on
other text.{null}

```python
from fnsft_trl import FunctionalNetworkTemplate, lesion, select_neurons

template = FunctionalNetworkTemplate.from_pretrained("this directory")
mask = select_neurons(template, component_ids=[0])
with lesion(model, mask):
    ...
```
"""


def model_name(model: nn.Module) -> str:
    """The id of a model, or the name of the directory it was loaded from; empty when it was made in memory."""
    name = model.config._name_or_path
    return Path(name).name if Path(name).exists() else name


def read_template_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Read and check a template's `config.json`, without torch.

    Raises:
        FNSFTError: there is no template in the directory, or one that this version cannot read.
    """
    _complete(Path(directory))
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FNSFTError(f"no template at {directory}: {CONFIG_FILE} is missing; make one with `fnsft discover`")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FNSFTError(f"{path} is not valid JSON ({error}); save the template again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FNSFTError(f"{path} does not describe a template of functional networks (no format {FORMAT!r})")
    if config.get("format_version") != FORMAT_VERSION:
        raise FNSFTError(
            f"{path} has format version {config.get('format_version')!r}, this package reads {FORMAT_VERSION}; "
            "upgrade fnsft-trl"
        )
    required = ("base_model", "revision", "architecture", "site", "widths", "threshold", "settings", "calibration")
    missing = [key for key in (*required, "components") if key not in config]
    if missing:
        raise FNSFTError(f"{path} lacks {', '.join(missing)}; save the template again")
    return config


def _partial(directory: Path, name: str) -> Path:
    return directory / f".{name}.partial"


def _complete(directory: Path) -> None:
    """Put files that were written completely in the place of the old ones."""
    if not (directory / _READY).exists():
        return
    for name in (TENSOR_FILE, CARD_FILE, CONFIG_FILE):
        if _partial(directory, name).exists():
            os.replace(_partial(directory, name), directory / name)
    (directory / _READY).unlink()
