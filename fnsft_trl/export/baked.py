"""A trained model with a mask baked into its weights, as an ordinary checkpoint."""

import math
import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import FNSFTError
from ..evaluation.evaluated import recorded_neurons
from ..interventions.baking import bake_amplification, bake_lesion, lesion_note
from ..neurons.mask import NeuronMask, fitting_sites
from .on_disk import move_to_disk
from .whole import WholeSource
from .written import Written, written_model


@dataclass(frozen=True)
class BakedMask:
    """
    What a mask does, as it goes into weights.

    Attributes:
        neurons (`NeuronMask`): whose activations are multiplied.
        factor (`float`): by what: 0 silences them.

    Raises:
        FNSFTError: there is no neuron, or the factor is not finite or 1, so that nothing would be baked.
    """

    neurons: NeuronMask
    factor: float = 0.0

    def __post_init__(self) -> None:
        if self.neurons.count == 0:
            raise FNSFTError("the mask has no neuron, so nothing would be baked; export it merged")
        if self.factor == 1 or not math.isfinite(self.factor):
            raise FNSFTError(
                f"the factor to bake is {self.factor:g}; it must be finite, and other than 1, which changes nothing"
            )


def to_baked(
    source_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    mask: NeuronMask | None = None,
    *,
    factor: float | None = None,
    dtype: str = "auto",
    **loading: Any,
) -> BakedMask:
    """Write a model that computes without hooks what the trained one computes under its mask.

    An adapter is merged into its base first. The outgoing weights of the neurons are then multiplied by the factor:
    zero, where they are silenced. `config.json` (`baked_lesion`, `baked_amplification`) and the card say so.

    Args:
        source_dir: directory of a saved adapter, or of a model that was trained whole.
        output_dir: where the checkpoint is written.
        mask: the neurons (for a `preserve`, the complement). By default those of the mask of the run that made the
            model.
        factor: with a mask, what their activations are multiplied by: 0 by default, which silences them.
        dtype, loading: see [`~fnsft_trl.export.to_merged`].

    Returns:
        What was baked.

    Raises:
        FNSFTError: as in `to_merged`; there is no mask, or one of another model; the factor is 1 or not finite.
    """
    if mask is None and factor is not None:
        raise FNSFTError("factor is what a given mask multiplies by; give mask, or drop factor")
    given = None if mask is None else BakedMask(mask, 0.0 if factor is None else factor)
    source = WholeSource.read(source_dir)
    baked = mask_to_bake(source, source.outline(**loading), given)
    with written_model(source, output_dir, "baked", dtype=dtype, loading=loading) as written:
        bake_on_disk(written, baked)
        written.note("Amplification" if baked.factor else "Lesion", lesion_note(written.model))
    return baked


def mask_to_bake(source: WholeSource, outline: nn.Module, given: BakedMask | None) -> BakedMask:
    """What is to be baked, checked against the model: what is given, or what the mask of the run did.

    Raises:
        FNSFTError: there is nothing, or it is of another model.
    """
    found = run_mask(source, outline) if given is None else given
    if found is None:
        raise FNSFTError(
            f"{source.directory} was not trained under a mask, so there is none to bake; say which neurons: "
            "ica_template_path and mask_mode"
        )
    fitting_sites(outline, found.neurons)
    return found


def run_mask(source: WholeSource, outline: nn.Module) -> BakedMask | None:
    """What the mask did in the run that made a model; `None` where it had none."""
    mode = (source.record or {}).get("mask_mode")
    if not mode:
        return None
    selected = recorded_neurons(str(source.directory), source.record, outline)
    if mode == "amplify":
        return BakedMask(selected, source.record["mask_factor"])
    return BakedMask(selected if mode == "lesion" else ~selected)


def bake_on_disk(written: Written, baked: BakedMask) -> None:
    """Bake a mask layer by layer, so that memory holds no more than one layer's weights of it."""
    mask = baked.neurons
    for site in fitting_sites(written.model, mask):
        if site.layer in mask.layers and mask.layers[site.layer].any():
            for part in site.layout.slices:
                move_to_disk(part.tensor(written.model), written.weights)
            of_layer = NeuronMask({site.layer: mask.layers[site.layer]}, mask.site)
            if baked.factor:
                bake_amplification(written.model, of_layer, baked.factor)
            else:
                bake_lesion(written.model, of_layer)
