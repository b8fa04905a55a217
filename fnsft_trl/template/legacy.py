"""Templates as the original project kept them: lists of neurons as JSON. Free of torch."""

import json
from pathlib import Path
from typing import Any

from ..config import SITES
from ..errors import FNSFTError
from ..hub.names import UNKNOWN
from .description import Calibration, Component, TemplateDescription
from .storage import read_json


LEGACY_FILE = "global_templates.json"

_FEW, _ROOM = 2**26, 1000  # loadings that any file may ask for, and more of them for each of its bytes

Members = list[dict[int, list[int]]]  # for each network: layer -> its neurons, ascending


def read_legacy(path: Path) -> tuple[TemplateDescription, Members]:
    """Read the original's JSON template.

    Args:
        path: the file.

    Returns:
        A description, of unknown reliability and, unless the file says otherwise, of the MLPs' output channels; and
        the neurons of every network.

    Raises:
        FNSFTError: the file does not have that form, or names a neuron or a layer that it has no room for.
    """
    data = read_json(path)
    form = '{"name", "layout": {"captured_layers_sorted", "hidden_size"}, "templates": {network: {layer: [neurons]}}}'
    if not isinstance(data, dict) or not isinstance(data.get("layout"), dict) or "templates" not in data:
        raise FNSFTError(f"{path} is no template of the original project; it must have the form {form}")
    layers, width = data["layout"].get("captured_layers_sorted"), data["layout"].get("hidden_size")
    site = data.get("site", "mlp_output")
    if not isinstance(layers, list) or not all(_is_index(layer, 10**6) for layer in layers) or not layers:
        raise FNSFTError(f"{path}: captured_layers_sorted must be a list of layers")
    if not _is_index(width, 2**24) or width == 0 or site not in SITES:
        raise FNSFTError(f"{path}: hidden_size must be a number of neurons, site one of: {', '.join(SITES)}")
    networks = data["templates"]
    count = len(networks) if isinstance(networks, dict) else 0
    if count * len(set(layers)) * width > _FEW + _ROOM * path.stat().st_size:
        raise FNSFTError(
            f"{path}: hidden_size is {width} in {len(set(layers))} layers, of which its {count} networks name hardly "
            "any neuron: loadings for all of them would fill the memory; correct hidden_size"
        )
    if (
        not isinstance(networks, dict)
        or set(networks) != {str(number) for number in range(len(networks))}
        or not networks
    ):
        raise FNSFTError(f"{path}: templates must be networks numbered from 0")
    members: Members = []
    for number in range(len(networks)):
        by_layer = networks[str(number)]
        if not isinstance(by_layer, dict) or not set(by_layer) <= {str(layer) for layer in layers}:
            raise FNSFTError(f"{path}: network {number} has layers that captured_layers_sorted does not name")
        for layer, neurons in by_layer.items():
            if not isinstance(neurons, list) or not all(_is_index(neuron, width) for neuron in neurons):
                raise FNSFTError(f"{path}: network {number}, layer {layer}: neurons must be numbers below {width}")
        members.append({int(layer): sorted(set(neurons)) for layer, neurons in by_layer.items() if neurons})
    return _description(members, dict.fromkeys(sorted(set(layers)), width), site), members


def _is_index(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _description(members: Members, widths: dict[int, int], site: str) -> TemplateDescription:
    counts = [{layer: len(neurons) for layer, neurons in of_network.items()} for of_network in members]
    return TemplateDescription(
        base_model=UNKNOWN,
        revision=None,
        architecture=UNKNOWN,
        site=site,
        license=None,
        widths=widths,
        statistics=False,
        threshold=None,
        settings={},
        calibration=Calibration(sources=(), tokens=0, sha256=None),
        null=None,
        weights=None,
        tensors_sha256=None,
        components=tuple(Component(None, None, None, None, sum(layers.values()), layers) for layers in counts),
    )


def legacy_bytes(members: Members, widths: dict[int, int], site: str) -> bytes:
    """The original's JSON template of some networks.

    The site is added under a name that the original does not read; the form knows no loadings and no reliability.

    Raises:
        FNSFTError: the layers differ in width, which the form has no room for.
    """
    if len(set(widths.values())) > 1:
        raise FNSFTError("the original's JSON form has one width for all layers; this model's layers differ in width")
    data = {
        "name": "global_templates_v1",
        "site": site,
        "layout": {"captured_layers_sorted": sorted(widths), "hidden_size": next(iter(widths.values()))},
        "templates": {
            str(number): {str(layer): neurons for layer, neurons in of_network.items()}
            for number, of_network in enumerate(members)
        },
    }
    return (json.dumps(data) + "\n").encode()
