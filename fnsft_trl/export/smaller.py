"""A trained model without the neurons that a mask silences: a smaller checkpoint that computes the same."""

import os
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Conv1D, PretrainedConfig, PreTrainedModel

from ..errors import FNSFTError, library_errors
from ..interventions.baking import baked_neurons
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import NeuronSite, find_neuron_sites
from ..tuner.saved import first_line
from .baked import BakedMask, mask_to_bake, run_mask
from .on_disk import move_to_disk
from .whole import WholeSource
from .written import written_model


REMOVED = "removed_neurons"  # entry of the model's config
_OFTEN_UNSET = ("n_inner",)  # fields for the width that may be null, where it then follows from others


@dataclass(frozen=True)
class Removal:
    """What was removed from a model.

    Attributes:
        removed (`NeuronMask`): the neurons, in the numbers that they had.
        width (`int`): neurons of every layer now.
        padded (`dict[int, int]`): layer -> how many of these are zeros, because another layer kept more; without the
            layers that have none.
        before (`int`), after (`int`): parameters of the model.
    """

    removed: NeuronMask
    width: int
    padded: dict[int, int]
    before: int
    after: int

    def __str__(self) -> str:
        told = (
            f"{self.removed.count} neurons ({self.removed.fraction:.1%}) were removed from up, gate and down "
            f"projections: {self.after:,} parameters, of {self.before:,}"
        )
        if self.padded:
            told += (
                f". The config holds one width for all layers: it is the widest layer's, {self.width}, and "
                f"{len(self.padded)} layers are padded with {sum(self.padded.values())} neurons of zeros"
            )
        return told


def to_smaller(
    source_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    mask: NeuronMask | None = None,
    *,
    dtype: str = "auto",
    **loading: Any,
) -> Removal:
    """Write a model without some neurons, which computes what the trained one computes while they are silenced.

    Their rows of the up and gate projections and their columns of the down projection are gone. Configurations hold
    one width for all layers: it becomes that of the layer that keeps most, and the others are padded with zeros.

    Args:
        source_dir: directory of a saved adapter, or of a model that was trained whole; one with a baked lesion, too.
        output_dir: where the checkpoint is written. The networks of the source do not go along: they number its
            neurons.
        mask: the neurons to remove. By default those of a baked lesion and those that the mask silenced in the run
            that made the model.
        dtype, loading: see [`~fnsft_trl.export.to_merged`].

    Returns:
        What was removed.

    Raises:
        FNSFTError: as in `to_merged`; there are none to remove, they are no neurons but output channels or experts'
            units, a layer would keep none, or no field of the configuration holds the width.
    """
    source = WholeSource.read(source_dir)
    outline = source.outline(**loading)
    mask = neurons_to_remove(source, outline, mask)
    smaller = _smaller_config(outline, mask)
    with written_model(source, output_dir, "smaller", dtype=dtype, loading=loading) as written:
        removal = remove_neurons(written.model, mask, smaller, written.weights)
        written.has_networks = False
        written.note("Removed neurons", f"{removal}. `config.json` lists them under `{REMOVED}`.")
    return removal


def neurons_to_remove(source: WholeSource, outline: PreTrainedModel, mask: NeuronMask | None) -> NeuronMask:
    """The neurons to remove, checked against the model.

    Raises:
        FNSFTError: see [`to_smaller`].
    """
    baked = baked_neurons(outline)
    if mask is None:
        of_run = run_mask(source, outline)
        if of_run is not None and of_run.factor:
            raise FNSFTError(
                f"{source.directory} was trained under mask_mode=amplify, which silences no neuron; export it baked"
            )
        mask = None if of_run is None else of_run.neurons
        if baked is not None:
            mask = baked if mask is None or mask.site != baked.site else _union(outline, baked, mask)
    mask = mask_to_bake(source, outline, None if mask is None else BakedMask(mask)).neurons
    if mask.site != "mlp_intermediate":
        raise FNSFTError(
            f"the mask is of the site {mask.site}, whose channels other layers read; only neurons (mlp_intermediate) "
            "can be removed; export it baked"
        )
    for site in fitting_sites(outline, mask):
        if site.experts:
            raise FNSFTError(
                f"layer {site.layer} ({site.name}) holds experts, whose units cannot be removed one by one; export it "
                "baked"
            )
        if site.layer in mask.layers and mask.layers[site.layer].all():
            raise FNSFTError(
                f"the mask silences all {site.width} neurons of layer {site.layer}, which would leave a layer of no "
                "width; export it baked"
            )
    return mask


def _union(outline: PreTrainedModel, *masks: NeuronMask) -> NeuronMask:
    widths = {site.layer: site.width for site in find_neuron_sites(outline, kind=masks[0].site)}
    first, second = (mask.over(widths) for mask in masks)
    return first | second


@torch.no_grad()
def remove_neurons(model: PreTrainedModel, mask: NeuronMask, smaller: PretrainedConfig, folder: Path) -> Removal:
    """Remove neurons from a model, layer by layer.

    Args:
        model: without adapters. Changed in place, its config too.
        mask: the neurons.
        smaller: the model's config with the new width.
        folder: for the new weights.
    """
    sites = find_neuron_sites(model)
    everyone = mask.over({site.layer: site.width for site in sites})
    width = max(int((~members).sum()) for members in everyone.layers.values())
    before, padded = model.num_parameters(), {}
    for site in sites:
        kept = (~everyone.layers[site.layer]).nonzero().flatten()
        if len(kept) < width:
            padded[site.layer] = width - len(kept)
        _shrink(model, site, kept, width, folder)
    for name in _changed_fields(model.config, smaller):
        setattr(model.config.get_text_config(), name, getattr(smaller.get_text_config(), name))
    if vars(model.config).get("baked_lesion") is not None:
        del model.config.baked_lesion  # numbers neurons that are gone
    widths = {str(site.layer): site.width for site in sites}
    setattr(model.config, REMOVED, {"neurons": mask.to_ranges(), "widths": widths})
    return Removal(mask, width, padded, before, model.num_parameters())


def _shrink(model: nn.Module, site: NeuronSite, kept: torch.Tensor, width: int, folder: Path) -> None:
    """Let a layer have the neurons that are kept, in their order, and then zeros up to a width."""
    for part in site.layout.slices:
        module = model.get_submodule(part.module_name)
        old = part.tensor(model)
        offsets = tuple(
            offset // part.units * width for offset in part.offsets
        )  # of up behind gate, where they are one
        new = replace(part, count=width, units=width, offsets=offsets)
        shape = list(old.shape)
        shape[part.dim] = width * len(part.offsets)
        values = old.new_zeros(shape)
        places = new.indices(torch.arange(len(kept))).to(old.device)
        values.index_copy_(part.dim, places, old.index_select(part.dim, part.indices(kept).to(old.device)))
        parameter = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(module, part.parameter, parameter)
        move_to_disk(parameter, folder)
        _set_width(module, part.side, shape[part.dim])


def _set_width(module: nn.Module, side: str, width: int) -> None:
    if isinstance(module, Conv1D):
        module.nx, module.nf = (module.nx, width) if side == "output" else (width, module.nf)
    elif side == "output":
        module.out_features = width
    else:
        module.in_features = width


def _smaller_config(outline: PreTrainedModel, mask: NeuronMask) -> PretrainedConfig:
    """The config of the smaller model: which of its fields hold the width is found by trying them.

    Raises:
        FNSFTError: no field makes the layers, and nothing else, of that width.
    """
    sites = find_neuron_sites(outline)
    everyone = mask.over({site.layer: site.width for site in sites})
    width = max(int((~members).sum()) for members in everyone.layers.values())
    expected = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
    for site in sites:
        for part in site.layout.slices:
            shape = list(expected[part.full_name])
            shape[part.dim] = width * len(part.offsets)
            expected[part.full_name] = tuple(shape)
    for config in _candidates(outline.config, {site.width for site in sites}, width):
        made: nn.Module = nn.Module()
        with suppress(FNSFTError), torch.device("meta"), library_errors(first_line):
            made = type(outline)(config)  # a field of another meaning may make no model at all
        if {name: tuple(parameter.shape) for name, parameter in made.named_parameters()} == expected:
            return config
    raise FNSFTError(
        f"no field of the {type(outline.config).__name__} holds the width of its MLPs alone, so a smaller one could "
        "not be loaded; export it baked"
    )


def _candidates(config: PretrainedConfig, widths: set[int], width: int) -> Iterator[PretrainedConfig]:
    """Configs in which one field that may hold the width, or all of them, hold another."""
    text = config.get_text_config()
    fields = [name for name, value in vars(text).items() if type(value) is int and value in widths]
    fields += [name for name in _OFTEN_UNSET if vars(text).get(name, 0) is None]
    for names in [*([name] for name in fields), fields]:
        made = deepcopy(config)
        for name in names:
            setattr(made.get_text_config(), name, width)
        yield made


def _changed_fields(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    old, new = (vars(config.get_text_config()) for config in (before, after))
    return [name for name in new if type(new[name]) is int and new[name] != old.get(name)]
