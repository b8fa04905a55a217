"""Which neurons differ between two sets of weights, and whether they are those that an adapter says."""

import os
from collections.abc import Mapping, Sequence

import torch
from peft import load_peft_weights

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, find_neuron_sites
from .adapter import PREFIX, delta_key, delta_mask, load_model, read_delta_config


def changed_neurons(
    sites: Sequence[NeuronSite], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[NeuronMask, list[str]]:
    """Compare two sets of weights of one model, value by value (-0 equals 0).

    Args:
        sites: the model's sites.
        before, after: parameter name -> tensor, with the same names and shapes.

    Returns:
        The neurons any of whose weights differ; and the names of the parameters that differ in an entry that belongs
        to no neuron.
    """
    differing = {name: before[name] != after[name] for name in before if not torch.equal(before[name], after[name])}
    layers = {}
    for site in sites:
        members = torch.zeros(site.width, dtype=torch.bool)
        for part in site.layout.slices:
            entries = differing.pop(part.full_name, None)
            if entries is not None:
                members[part.touched(entries)] = True
        layers[site.layer] = members
    return NeuronMask(layers, sites[0].kind), sorted(differing)


def verify_merge(
    before: str | os.PathLike | Mapping[str, torch.Tensor],
    after: str | os.PathLike | Mapping[str, torch.Tensor],
    adapter: str | os.PathLike | NeuronMask | None = None,
    *,
    sites: Sequence[NeuronSite] | None = None,
) -> NeuronMask:
    """Find the neurons that differ between two checkpoints, and check that they are those an adapter says.

    With the directory of an adapter, every weight of its neurons must be, bit for bit, the base value plus the delta
    in the precision of the checkpoint, and nothing else may differ but what the adapter trains besides. With a
    NeuronMask, the neurons that differ must be exactly its members, and nothing else may differ.

    Args:
        before, after: directories of checkpoints, or parameter name -> tensor.
        adapter: what should have changed; nothing is checked without it.
        sites: the model's sites; needed when `before` is not a directory.

    Returns:
        The neurons any of whose weights differ.

    Raises:
        FNSFTError: another weight differs, or one does not hold what it should; with the module and the neuron.
    """
    config = None if adapter is None or isinstance(adapter, NeuronMask) else read_delta_config(adapter)
    kind = config.site if config else adapter.site if isinstance(adapter, NeuronMask) else "mlp_intermediate"
    if isinstance(before, Mapping):
        if sites is None:
            raise FNSFTError("two sets of tensors say nothing of the model's structure; give sites too")
    else:
        is_base = config is not None and str(before) == config.base_model_name_or_path
        model = load_model(before, revision=config.revision if is_base else None)
        before, sites = dict(model.named_parameters()), find_neuron_sites(model, kind=kind)
    if not isinstance(after, Mapping):
        after = dict(load_model(after).named_parameters())
    _check_same_form(before, after)
    changed, others = changed_neurons(sites, before, after)
    if adapter is None:
        return changed
    state: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu") if config else {}
    expected = delta_mask(config, sites) if config else adapter
    for site in sites:
        _check_members(site, changed.layers[site.layer], expected.layers[site.layer], all_of_them=config is None)
        if config is not None:
            _check_values(site, expected.indices(site.layer), state, before, after)
    trained = {key.removeprefix(PREFIX).rpartition(".")[0] for key in state if "neuron_delta_" not in key}
    trained = {name.partition(".lora_")[0].partition(".token_adapter")[0] for name in trained}
    for name in others:
        if name.rpartition(".")[0] not in trained:
            raise FNSFTError(
                f"{name} differs in a weight that belongs to no neuron and that the adapter does not train"
            )
    return changed


def _check_same_form(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    for name in before:
        if name not in after or before[name].shape != after[name].shape:
            raise FNSFTError(f"{name} is missing after, or of another shape; the checkpoints are of different models")
        if before[name].dtype != after[name].dtype:
            raise FNSFTError(f"{name} is {before[name].dtype} before and {after[name].dtype} after; use one precision")


def _check_members(site: NeuronSite, changed: torch.Tensor, expected: torch.Tensor, *, all_of_them: bool) -> None:
    """No neuron of a layer differs that should not; with `all_of_them`, every one does that should."""
    extra = changed & ~expected
    if extra.any():
        raise FNSFTError(
            f"{int(extra.sum())} neurons of layer {site.layer} ({site.name}) differ that should not; the first is "
            f"neuron {int(extra.nonzero()[0])}"
        )
    missing = expected & ~changed
    if all_of_them and missing.any():
        neuron = int(missing.nonzero()[0])
        raise FNSFTError(f"neuron {neuron} of layer {site.layer} ({site.name}) should differ, but does not")


def _check_values(site: NeuronSite, neurons: torch.Tensor, state, before, after) -> None:
    for part in site.layout.slices:
        delta = state.get(delta_key(part))
        if delta is None:
            continue
        name, positions = part.full_name, part.indices(neurons)
        rows, found = (part.select(values[name].detach(), positions) for values in (before, after))
        wrong = (rows + delta.view_as(rows)).to(rows.dtype) != found
        if wrong.any():
            first = int(wrong.reshape(len(positions), -1).any(1).nonzero()[0])
            neuron = int(part.among(neurons).repeat(len(part.offsets))[first])
            raise FNSFTError(
                f"{name} of neuron {neuron} (layer {site.layer}) is not the base value plus the adapter's delta"
            )
