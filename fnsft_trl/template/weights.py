"""WeightProbes: a few numbers for each layer by which to measure how far a model's weights are from a template's base.

A probe is the scalar product of a layer's neuron weights with a random matrix of signs. The mean squared difference of
two models' probes estimates the squared norm of the difference of their weights.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat.torch import exact
from ..neurons.layout import whole_values
from ..neurons.sites import NeuronSite
from .schema import PROBES


_ROWS = 4096  # of a weight at a time, so that no large copy of it is made

WeightProbes = dict[int, dict]  # layer -> {"norm": float, "probes": list of floats}


@torch.no_grad()
def weight_probes(model: nn.Module, sites: Iterable[NeuronSite]) -> WeightProbes | None:
    """Measure the neuron weights of every layer.

    Weights are rounded to bfloat16 first, so that the precision in which a model was loaded does not count. Of a model
    with adapters, the base weights are measured.

    Args:
        model: the model in which the sites were found.
        sites: the layers.

    Returns:
        layer -> `norm` and `probes`; `None` where weights cannot be read (quantised, or not loaded). Sharded ones are
        gathered, for which all processes must make the call.
    """
    probes: WeightProbes = {}
    for site in sites:
        signs = torch.Generator().manual_seed(site.layer)
        norm, sums = 0.0, torch.zeros(PROBES, dtype=torch.float64)
        for part in site.layout.slices:
            weight = part.tensor(model)
            if not weight.is_floating_point() or weight.is_meta:
                return None
            weight = whole_values(weight)
            weight = weight.reshape(-1, weight.shape[-1])
            columns = _signs(weight.shape[1], signs).to(weight.device)
            for rows in weight.split(_ROWS):
                rounded = rows.to(torch.bfloat16).float()
                products = (rounded @ columns).cpu().double()  # (rows, probes)
                sums += (products * _signs(len(rows), signs)).sum(0)
                norm += float(exact(rounded).square().sum())
        probes[site.layer] = {
            "norm": _rounded(math.sqrt(norm)),
            "probes": [_rounded(value) for value in sums.tolist()],
        }
    return probes


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all weights of a model, adapters included; of sharded ones, of this process's part.

    Weights that are not loaded (offloaded ones) count by their names alone.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):  # settings of a quantisation
            continue
        value = value.to_local() if isinstance(value, DTensor) else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_difference(a: WeightProbes, b: WeightProbes) -> tuple[float, int]:
    """Estimate how far two models' weights are apart.

    Args:
        a, b: probes of the same layers.

    Returns:
        The norm of the difference as a share of the norm of `a`, with a standard error of about a tenth of it or less;
        and the layer in which that share is largest.
    """
    shares, total, norm = {}, 0.0, 0.0
    for layer in a:
        pairs = zip(a[layer]["probes"], b[layer]["probes"], strict=True)
        squared = sum((x - y) ** 2 for x, y in pairs) / PROBES
        total, norm = total + squared, norm + a[layer]["norm"] ** 2
        shares[layer] = squared / max(a[layer]["norm"] ** 2, 1e-30)
    return math.sqrt(total / max(norm, 1e-30)), max(shares, key=shares.__getitem__)


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count, PROBES), generator=generator).float() * 2 - 1


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
