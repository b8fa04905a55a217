"""Which neurons differ between two sets of weights, and whether they are those that an adapter says."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, find_neuron_sites
from ..tuner.saved import PREFIX, SavedAdapter, load_model
from .adapter import delta_key, delta_mask, read_deltas


def changed_neurons(
    sites: Sequence[NeuronSite], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[NeuronMask, list[str]]:
    """Compare two sets of weights of one model, value by value (-0 equals 0).

    Args:
        sites: the model's sites.
        before, after: parameter name -> tensor, of the same shapes; `after` may have more of them.

    Returns:
        The neurons any of whose weights differ; and the names of the parameters that differ in an entry that belongs
        to no neuron.
    """
    differing = {}
    for name, values in before.items():
        found = after[name].to(values.device)
        if not torch.equal(values, found):
            differing[name] = values != found
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
    **loading: Any,
) -> NeuronMask:
    """Find the neurons that differ between two checkpoints, and check that they are those an adapter says.

    With the directory of an adapter, every weight of its neurons must be the base value plus the delta, bit for bit in
    the precision of the checkpoint. Nothing else may differ but what the adapter trains besides. With a NeuronMask,
    the neurons that differ must be exactly its members, and nothing else may differ.

    Args:
        before, after: directories or names of checkpoints, or parameter name -> tensor. With an adapter, both are
            loaded with the head of its task and its tokens and labels; else as the classes that they were saved as.
        adapter: what should have changed; nothing is checked without it.
        sites: the model's sites; needed when `before` is not a directory.
        loading: further arguments of `from_pretrained`, such as `trust_remote_code`; `revision` is that of `before`,
            by default the adapter's.

    Returns:
        The neurons any of whose weights differ.

    Raises:
        FNSFTError: another weight differs, or one does not hold what it should; with the module and the neuron.
    """
    saved = None if adapter is None or isinstance(adapter, NeuronMask) else read_deltas(adapter)
    kind = saved.config.site if saved else adapter.site if isinstance(adapter, NeuronMask) else "mlp_intermediate"
    if isinstance(before, Mapping):
        if sites is None:
            raise FNSFTError("two sets of tensors say nothing of the model's structure; give sites too")
    else:
        model = _load(before, saved, loading)
        before, sites = dict(model.named_parameters(remove_duplicate=False)), find_neuron_sites(model, kind=kind)
    if not isinstance(after, Mapping):
        loading = {key: value for key, value in loading.items() if key != "revision"}
        after = dict(_load(after, saved, loading).named_parameters(remove_duplicate=False))
    _check_same_form(before, after)
    # One weight may have several names; what has one before may be several after, if an adapter trained a copy.
    names = {id(tensor): name for name, tensor in reversed(after.items()) if name in before}.values()
    changed, others = changed_neurons(sites, {name: before[name] for name in names}, after)
    if adapter is None:
        return changed
    expected = delta_mask(saved.config, sites) if saved else adapter
    for site in sites:
        _check_members(site, changed.layers[site.layer], expected.layers[site.layer], all_of_them=saved is None)
        if saved is not None:
            _check_values(site, expected.indices(site.layer), saved.tensors, before, after)
    trained = {name.rpartition(".")[0] for name in saved.whole} if saved else set()
    for key in saved.tensors if saved else ():
        name = key.removeprefix(PREFIX)
        trained |= {name.partition(part)[0] for part in (".lora_", ".token_adapter") if part in name}
    for name in others:
        if name.rpartition(".")[0] not in trained:
            what = "a weight that belongs to no neuron and that the adapter does not train"
            raise FNSFTError(f"{name} differs in {what}; compare with the base that the adapter was trained on")
    return changed


def _load(name: str | os.PathLike, adapter: SavedAdapter | None, loading: Mapping) -> PreTrainedModel:
    return load_model(str(name), **loading) if adapter is None else adapter.load_base(name, **loading)


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
        raise FNSFTError(
            f"neuron {neuron} of layer {site.layer} ({site.name}) should differ, but does not; export anew what was "
            "trained"
        )


def _check_values(site: NeuronSite, neurons: torch.Tensor, state, before, after) -> None:
    for part in site.layout.slices:
        delta = state.get(delta_key(part))
        if delta is None:
            continue
        name, positions = part.full_name, part.indices(neurons)
        rows, found = (part.select(values[name].detach().cpu(), positions) for values in (before, after))
        wrong = (rows + delta.view_as(rows)).to(rows.dtype) != found
        if wrong.any():
            first = int(wrong.reshape(len(positions), -1).any(1).nonzero()[0])
            neuron = int(part.among(neurons).repeat(len(part.offsets))[first])
            raise FNSFTError(
                f"{name} of neuron {neuron} (layer {site.layer}) is not the base value plus the adapter's delta; "
                "compare the model with the base that the adapter was trained on"
            )
