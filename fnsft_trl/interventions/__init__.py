"""Forward interventions: masks that silence or scale neurons, and the same baked into the weights."""

from .baking import KeptWeights, bake_amplification, bake_lesion, keep_neurons, unbake
from .masking import MaskHandle, amplify, forward_mask, lesion, masks_of, masks_off, preserve
from .replacement import Mean, Resampled, Zero


__all__ = [
    "KeptWeights",
    "MaskHandle",
    "Mean",
    "Resampled",
    "Zero",
    "amplify",
    "bake_amplification",
    "bake_lesion",
    "forward_mask",
    "keep_neurons",
    "lesion",
    "masks_of",
    "masks_off",
    "preserve",
    "unbake",
]
