"""Bake a lesion into the weights, so that it outlives the hooks (merge, GGUF, vLLM), and take it out again."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.layout import mask_positions, write_positions
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import base_linear, base_model, find_neuron_sites


_CONFIG_ENTRY = "baked_lesion"


@dataclass(frozen=True)
class KeptWeights:
    """The values that some neurons' weights had, to be put back by [`unbake`].

    Attributes:
        values (`dict`): parameter name -> (dimensions, positions along them, their values).
        lesion (`dict`, *optional*): the lesion that the model's config named at the time.
    """

    values: dict[str, tuple[tuple[int, ...], torch.Tensor, torch.Tensor]] = field(repr=False)
    lesion: dict | None = None


def keep_neurons(model: nn.Module, mask: NeuronMask) -> KeptWeights:
    """Copy all weights of some neurons, for instance to discard a full fine-tuning of them with [`unbake`].

    Args:
        model: a transformers model without adapters, not quantised.
        mask: the neurons. Layers that it does not cover are left out.

    Raises:
        FNSFTError: the mask was made for another model, or the weights are quantised or adapted.
    """
    return _keep(model, mask, outgoing_only=False)


@torch.no_grad()
def bake_lesion(model: nn.Module, mask: NeuronMask) -> KeptWeights:
    """Zero the outgoing weights of some neurons: their columns of the down projection.

    At `mlp_output`: the rows of the down projection and the entries of its bias. The model then computes without
    hooks what it computes under `lesion(model, mask)`; for a `preserve`, bake `~mask`. The model's config names the
    neurons (`baked_lesion`), so that a saved model says what was done to it.

    Args:
        model: a transformers model without adapters (merge them first), not quantised. Changed in place.
        mask: the neurons to silence. Layers that it does not cover are left alone.

    Returns:
        What [`unbake`] needs to put every weight back, bit for bit.

    Raises:
        FNSFTError: the mask was made for another model, or the weights are quantised or adapted.
    """
    kept = _keep(model, mask, outgoing_only=True)
    before = kept.lesion or {"site": mask.site, "neurons": {}}
    if before["site"] != mask.site:
        raise FNSFTError(f"the model carries a lesion at {before['site']}, so none can be baked at {mask.site}")
    for name, (dims, positions, _) in kept.values.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(mask_positions(parameter, dims, positions), 0)
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=mask.site)}
    both = [NeuronMask.from_ranges(ranges, widths, mask.site) for ranges in (before["neurons"], mask.to_ranges())]
    setattr(model.config, _CONFIG_ENTRY, {"site": mask.site, "neurons": (both[0] | both[1]).to_ranges()})
    return kept


@torch.no_grad()
def unbake(model: nn.Module, kept: KeptWeights) -> None:
    """Put back the weights that [`bake_lesion`] or [`keep_neurons`] found, bit for bit.

    Args:
        model: the model they were taken from. Changed in place.
        kept: what the function returned. Of several lesions, the last is to be taken out first.
    """
    for name, (dims, positions, values) in kept.values.items():
        write_positions(model.get_parameter(name), dims, positions, values)
    if kept.lesion is not None:
        setattr(model.config, _CONFIG_ENTRY, kept.lesion)
    elif _CONFIG_ENTRY in vars(model.config):
        delattr(model.config, _CONFIG_ENTRY)


def lesion_note(model: nn.Module) -> str | None:
    """The sentence of a model card on the lesion in the weights; `None` when there is none."""
    lesion = vars(base_model(model).config).get(_CONFIG_ENTRY)
    if lesion is None:
        return None
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=lesion["site"])}
    mask = NeuronMask.from_ranges(lesion["neurons"], widths, lesion["site"])
    return (
        f"The weights carry a lesion: the outgoing weights of {mask.count} neurons ({mask.fraction:.1%} at "
        f"{mask.site}) were set to zero. `config.json` lists them under `{_CONFIG_ENTRY}`."
    )


def _keep(model: nn.Module, mask: NeuronMask, *, outgoing_only: bool) -> KeptWeights:
    values = {}
    for site in fitting_sites(model, mask):
        neurons = mask.indices(site.layer) if site.layer in mask.layers else ()
        for part in site.layout.slices if len(neurons) else ():
            if outgoing_only and part.side == "output" and mask.site != "mlp_output":
                continue
            module = model.get_submodule(part.module_name)
            if base_linear(module) is not module:
                raise FNSFTError(f"{part.module_name} carries an adapter; merge it (merge_and_unload), then bake")
            parameter = part.tensor(model)
            if not parameter.is_floating_point():
                raise FNSFTError(
                    f"{part.module_name} is quantised, so no single neuron can be zeroed; load it unquantised, "
                    "then bake"
                )
            positions = part.indices(neurons).to(parameter.device)
            values[part.full_name] = (part.dims, positions, part.select(parameter.detach(), positions))
    return KeptWeights(values, vars(model.config).get(_CONFIG_ENTRY))
