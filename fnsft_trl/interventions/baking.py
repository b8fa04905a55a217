"""Bake a lesion or an amplification into the weights, so that it outlives the hooks (merge, GGUF, vLLM), and take it
out again."""

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.layout import mask_positions, write_positions
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import base_linear, base_model, find_neuron_sites


_LESION, _AMPLIFICATION = "baked_lesion", "baked_amplification"  # entries of the model's config


@dataclass(frozen=True)
class KeptWeights:
    """The values that some neurons' weights had, to be put back by [`unbake`].

    Attributes:
        values (`dict`): parameter name -> (dimensions, positions along them, their values).
        before (`dict`): what the model's config named as baked at the time: entry -> what it says.
        baked (`dict`): what it names since; `before` where nothing was baked.
    """

    values: dict[str, tuple[tuple[int, ...], torch.Tensor, torch.Tensor]] = field(repr=False)
    before: dict[str, dict] = field(default_factory=dict)
    baked: dict[str, dict] = field(default_factory=dict)


def keep_neurons(model: nn.Module, mask: NeuronMask) -> KeptWeights:
    """Copy all weights of some neurons, for instance to discard a full fine-tuning of them with [`unbake`].

    Args:
        model: a transformers model without adapters, not quantised.
        mask: the neurons. Layers that it does not cover are left out.

    Raises:
        FNSFTError: the mask was made for another model, or the weights are quantised, offloaded or adapted.
    """
    values = _values(model, mask, outgoing_only=False)
    baked = _baked(model)
    return KeptWeights(values, baked, baked)


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
        FNSFTError: the mask was made for another model, the weights are quantised, offloaded or adapted, or the model
            carries a lesion at the other site, or an amplification. The model is left as it was.
    """
    values = _values(model, mask, outgoing_only=True)
    found = _baked(model)
    if _AMPLIFICATION in found:
        raise FNSFTError(
            "the model carries an amplification, over which no lesion is baked; take it out first (unbake)"
        )
    before = found.get(_LESION)
    silenced = mask.over({site.layer: site.width for site in find_neuron_sites(model, kind=mask.site)})
    if before is not None:
        if before["site"] != mask.site:
            raise FNSFTError(
                f"the model carries a lesion at {before['site']}, so none can be baked at {mask.site}; bake into a "
                "model without one"
            )
        silenced = silenced | _silenced(model, before)
    kept = KeptWeights(values, found, {_LESION: {"site": mask.site, "neurons": silenced.to_ranges()}})
    for name, (dims, positions, _) in values.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(mask_positions(parameter, dims, positions), 0)
    _name_baked(model, kept.baked)
    return kept


@torch.no_grad()
def bake_amplification(model: nn.Module, mask: NeuronMask, factor: float) -> KeptWeights:
    """Multiply the outgoing weights of some neurons, as [`bake_lesion`] zeroes them.

    The model then computes without hooks what it computes under `amplify(model, mask, factor)`. The model's config
    names neurons and factor (`baked_amplification`). Further neurons may be multiplied by the same factor.

    Args:
        model, mask: as of [`bake_lesion`].
        factor: a finite number, neither 0 (which is a lesion) nor 1 (which changes nothing).

    Returns:
        What [`unbake`] needs to put every weight back, bit for bit.

    Raises:
        FNSFTError: as [`bake_lesion`], or the model carries a lesion, another amplification, or one of these neurons.
    """
    if not isinstance(factor, Real) or not math.isfinite(factor) or factor in (0, 1):
        raise FNSFTError(f"the factor to bake is {factor!r}; it must be finite, and neither 0 (bake_lesion) nor 1")
    values = _values(model, mask, outgoing_only=True)
    found = _baked(model)
    amplified = mask.over({site.layer: site.width for site in find_neuron_sites(model, kind=mask.site)})
    if found:
        before = found.get(_AMPLIFICATION)
        is_one = before is not None and (before["site"], before["factor"]) == (mask.site, factor)
        if not is_one or (_silenced(model, before) & amplified).count:
            raise FNSFTError(
                f"the model carries a {min(found)} already, over which nothing is amplified; take it out first"
            )
        amplified = amplified | _silenced(model, before)
    entry = {"site": mask.site, "neurons": amplified.to_ranges(), "factor": float(factor)}
    kept = KeptWeights(values, found, {_AMPLIFICATION: entry})
    for name, (dims, positions, old) in values.items():
        write_positions(model.get_parameter(name), dims, positions, old * factor)
    _name_baked(model, kept.baked)
    return kept


@torch.no_grad()
def unbake(model: nn.Module, kept: KeptWeights) -> None:
    """Put back the weights that [`bake_lesion`] or [`keep_neurons`] found, bit for bit.

    Args:
        model: the model they were taken from. Changed in place.
        kept: what the function returned. Of several lesions, the last is to be taken out first.

    Raises:
        FNSFTError: they are of another model, or the model carries another lesion than they left. The model is left as
            it was.
    """
    base_model(model)  # which something else is not
    if not isinstance(kept, KeptWeights):
        raise FNSFTError(f"the kept weights are a {type(kept).__name__}; expected what bake_lesion returned")
    parameters = dict(model.named_parameters())
    for name, (dims, positions, values) in kept.values.items():
        parameter = parameters.get(name)
        if parameter is None or _shape(parameter, dims, positions) != values.shape:
            raise FNSFTError(
                f"the kept weights are of another model: this one has no {name} that they fit (merge or unload an "
                "adapter that was put around it first)"
            )
    if _baked(model) != kept.baked:
        raise FNSFTError(
            "the lesion that the model's config names is not the one that these weights were kept for; of several "
            "lesions, take the last one out first"
        )
    for name, (dims, positions, values) in kept.values.items():
        parameter = parameters[name]
        write_positions(parameter, dims, positions.to(parameter.device), values.to(parameter))
    _name_baked(model, kept.before)


def baked_neurons(model: nn.Module) -> NeuronMask | None:
    """The neurons whose lesion is in the weights, as the model's config names them; `None` when there is none."""
    said = vars(base_model(model).config).get("baked_lesion")
    return None if said is None else _silenced(model, said)


def lesion_note(model: nn.Module) -> str | None:
    """The sentence of a model card on the lesion or amplification in the weights; `None` when there is none."""
    model = base_model(model)
    for entry, said in _baked(model).items():
        mask = _silenced(model, said)
        what, done = "a lesion", "set to zero"
        if entry == _AMPLIFICATION:
            what, done = "an amplification", f"multiplied by {said['factor']:g}"
        return (
            f"The weights carry {what}: the outgoing weights of {mask.count} neurons "
            f"({mask.fraction:.1%} at {mask.site}) were {done}. `config.json` lists them under `{entry}`."
        )
    return None


def _baked(model: nn.Module) -> dict[str, dict]:
    """What a model's config says that its weights carry."""
    return {
        entry: found for entry in (_LESION, _AMPLIFICATION) if (found := vars(model.config).get(entry)) is not None
    }


def _name_baked(model: nn.Module, baked: dict[str, dict]) -> None:
    for entry in (_LESION, _AMPLIFICATION):
        if entry in baked:
            setattr(model.config, entry, baked[entry])
        elif vars(model.config).get(entry) is not None:
            delattr(model.config, entry)


def _silenced(model: nn.Module, lesion: dict) -> NeuronMask:
    """The neurons that a config's entry names."""
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=lesion["site"])}
    return NeuronMask.from_ranges(lesion["neurons"], widths, lesion["site"])


def _shape(parameter: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> tuple[int, ...] | None:
    """Shape of the entries at some positions of a parameter; `None` where it has no such positions."""
    counted = math.prod(parameter.shape[dim] for dim in dims) if max(dims) < parameter.dim() else 0
    if not len(positions) or int(positions.max()) >= counted:
        return None
    return (len(positions), *(size for dim, size in enumerate(parameter.shape) if dim not in dims))


def _values(model: nn.Module, mask: NeuronMask, *, outgoing_only: bool) -> dict:
    """The values of some neurons' weights, as [`KeptWeights`] holds them."""
    values = {}
    for site in fitting_sites(model, mask):
        neurons = mask.indices(site.layer) if site.layer in mask.layers else ()
        for part in site.layout.slices if len(neurons) else ():
            if (outgoing_only and part.side == "output" and mask.site != "mlp_output") or not len(part.among(neurons)):
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
            if parameter.is_meta:
                raise FNSFTError(f"{part.full_name} is offloaded; load the model without, then bake")
            positions = part.indices(neurons).to(parameter.device)
            values[part.full_name] = (part.dims, positions, part.select(parameter.detach(), positions))
    return values
