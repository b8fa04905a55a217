"""Which neurons belong to a network, by its loadings and a threshold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..threshold import ThresholdRule


if TYPE_CHECKING:
    import numpy as np


def members(loadings: Mapping[int, np.ndarray], threshold: ThresholdRule | None) -> dict[int, np.ndarray]:
    """The neurons of one network.

    Args:
        loadings: layer -> signed loadings, shape (neurons of the layer,).
        threshold: the rule; `None`: the neurons with a loading above 0.

    Returns:
        Layer -> bool array, shape (neurons of the layer,).
    """
    import numpy as np

    if threshold is None:
        return {layer: values > 0 for layer, values in loadings.items()}
    pooled = np.concatenate(list(loadings.values()))  # (neurons of all layers,)
    value = threshold.value
    if threshold.rule == "percentile":
        least = float(np.percentile(np.abs(pooled), value))
        return {layer: np.abs(values) > least for layer, values in loadings.items()}
    if threshold.rule == "layer_percentile":
        return {i: np.abs(v) > float(np.percentile(np.abs(v), value)) for i, v in loadings.items()}
    mean, deviation = float(pooled.mean(dtype=np.float64)), float(pooled.std(dtype=np.float64))
    above = {layer: values > mean + value * deviation for layer, values in loadings.items()}
    if threshold.rule == "zscore_positive":
        return above
    return {layer: above[layer] | (values < mean - value * deviation) for layer, values in loadings.items()}
