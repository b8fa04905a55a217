"""Forward interventions: masks that silence neurons, and lesions baked into the weights."""

from .baking import KeptWeights, bake_lesion, keep_neurons, unbake
from .masking import MaskHandle, lesion, masks_of, masks_off, preserve


__all__ = [
    "KeptWeights",
    "MaskHandle",
    "bake_lesion",
    "keep_neurons",
    "lesion",
    "masks_of",
    "masks_off",
    "preserve",
    "unbake",
]
