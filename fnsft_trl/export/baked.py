"""A trained model with a mask baked into its weights, as an ordinary checkpoint."""

import os
from typing import Any

from torch import nn

from ..errors import FNSFTError
from ..evaluation.evaluated import recorded_neurons
from ..interventions.baking import bake_lesion, lesion_note
from ..neurons.mask import NeuronMask, fitting_sites
from .on_disk import move_to_disk
from .whole import WholeSource
from .written import Written, written_model


def to_baked(
    source_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    mask: NeuronMask | None = None,
    *,
    dtype: str = "auto",
    **loading: Any,
) -> NeuronMask:
    """Write a model that computes without hooks what the trained one computes under its mask.

    An adapter is merged into its base first. The outgoing weights of the silenced neurons are then zero; `config.json`
    (`baked_lesion`) and the card say so.

    Args:
        source_dir: directory of a saved adapter, or of a model that was trained whole.
        output_dir: where the checkpoint is written.
        mask: the neurons to silence (for a `preserve`, the complement). By default those that the mask silenced in the
            run that made the model.
        dtype, loading: see [`~fnsft_trl.export.to_merged`].

    Returns:
        The neurons that were silenced.

    Raises:
        FNSFTError: as in `to_merged`; there is no mask, or one of another model.
    """
    source = WholeSource.read(source_dir)
    mask = mask_to_bake(source, source.outline(**loading), mask)
    with written_model(source, output_dir, "baked", dtype=dtype, loading=loading) as written:
        bake_on_disk(written, mask)
        written.note("Lesion", lesion_note(written.model))
    return mask


def mask_to_bake(source: WholeSource, outline: nn.Module, mask: NeuronMask | None) -> NeuronMask:
    """The neurons to silence, checked against the model: those that are given, or that a run's mask silenced.

    Raises:
        FNSFTError: there are none, or they are of another model.
    """
    found = run_mask(source, outline) if mask is None else mask
    if found is None or found.count == 0:
        raise FNSFTError(
            f"{source.directory} was not trained under a mask, so there is no lesion to bake; say which neurons: "
            "ica_template_path and mask_mode"
            if found is None
            else "the mask silences no neuron, so nothing would be baked; export it merged"
        )
    fitting_sites(outline, found)
    return found


def run_mask(source: WholeSource, outline: nn.Module) -> NeuronMask | None:
    """The neurons that the mask silenced in the run that made a model; `None` where it had none.

    Raises:
        FNSFTError: its mask did something else to them, which zeros cannot express.
    """
    mode = (source.record or {}).get("mask_mode")
    if not mode:
        return None
    if mode not in ("lesion", "preserve"):
        raise FNSFTError(
            f"{source.directory} was trained under mask_mode={mode}, which is no lesion; export it merged"
        )
    selected = recorded_neurons(str(source.directory), source.record, outline)
    return selected if mode == "lesion" else ~selected


def bake_on_disk(written: Written, mask: NeuronMask) -> None:
    """Bake a lesion layer by layer, so that memory holds no more than one layer's weights of it."""
    for site in fitting_sites(written.model, mask):
        if site.layer in mask.layers and mask.layers[site.layer].any():
            for part in site.layout.slices:
                move_to_disk(part.tensor(written.model), written.weights)
            bake_lesion(written.model, NeuronMask({site.layer: mask.layers[site.layer]}, mask.site))
