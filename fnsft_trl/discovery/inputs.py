"""The inputs of linear modules, read in forward passes over texts. Activations only: weights are not looked at."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..neurons.sites import base_model, linear_shape
from .activations import batch_inputs, decoder_ids


_PROBE = 4  # tokens by which inputs that several modules share are told


def module_named(model: nn.Module, name: str) -> nn.Module:
    """A module of the base model, inside a `PeftModel` or not."""
    return base_model(model).get_submodule(name)


def batches_of(sequences: Sequence[list[int]], batch_size: int) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
    """Batches of sequences of similar length, for a forward pass.

    Returns:
        For each the inputs, and where the first token of each sequence and all others are in the flattened batch.
    """
    ordered = sorted(sequences, key=len)
    found = []
    for start in range(0, len(ordered), batch_size):
        ids, present = batch_inputs(ordered[start : start + batch_size])
        others = present.bool().clone()
        others[:, 0] = False
        first = torch.arange(len(ids)) * ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": present}
        found.append((inputs, first, others.flatten().nonzero().flatten()))
    return found


@torch.no_grad()
def run_taps(
    model: nn.Module,
    groups: Sequence[tuple[str, ...]],
    inputs: dict[str, torch.Tensor],
    read: Callable[[tuple[str, ...], torch.Tensor], None],
) -> None:
    """One forward pass, in which each input is read once.

    Args:
        model: as in [`KeptDirections.find`].
        groups: modules that read the same input.
        inputs: of the forward pass; on the CPU.
        read: is given the group and its input in float32, shape (sequences * positions, width).

    Raises:
        FNSFTError: a module is not reached, or an activation is NaN or infinite.
    """
    whole = base_model(model)
    reached: set[tuple[str, ...]] = set()
    positions = inputs["input_ids"].numel()

    def hook_of(group: tuple[str, ...]):
        def hook(module: nn.Module, args: tuple) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if len(rows) != positions:
                raise FNSFTError(
                    f"{group[0]} is given {len(rows)} vectors for {positions} tokens, so it cannot be told which are "
                    "whose; leave this module out of what is restored or protected"
                )
            if not torch.isfinite(rows.sum()):
                raise FNSFTError(
                    f"an input of {group[0]} is NaN or infinite; check the model's weights, or load it in float32"
                )
            reached.add(group)
            read(group, rows)

        return hook

    handles = [module_named(model, group[0]).register_forward_pre_hook(hook_of(group)) for group in groups]
    try:
        _forward(whole, {name: tensor.to(input_device(whole)) for name, tensor in inputs.items()}, groups)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [group[0] for group in groups if group not in reached]:
        raise FNSFTError(f"the forward pass on text did not reach {missing[0]}, so its input has no directions")


def _forward(whole: nn.Module, inputs: dict[str, torch.Tensor], groups: Sequence[tuple[str, ...]]) -> None:
    """Run the backbone, and the head only where its input is asked for."""
    was_training = whole.training
    backbone = whole.base_model
    inside = f"{whole.base_model_prefix}."
    needs_head = backbone is whole or any(not name.startswith(inside) for group in groups for name in group)
    if whole.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": decoder_ids(whole, inputs["input_ids"])}
    whole.eval()
    try:
        (whole if needs_head else backbone)(**inputs, use_cache=False)
    finally:
        whole.train(was_training)


@torch.no_grad()
def reached_linears(model: nn.Module, ids: list[int]) -> set[str]:
    """Names of the linear modules of the base model that are given one vector for each token of text.

    Args:
        model: as in [`KeptDirections.find`].
        ids: some tokens.
    """
    found: set[str] = set()
    (inputs, _, _), *_ = batches_of([ids[:_PROBE]], 1)
    handles = []
    for name, module in base_model(model).named_modules():
        if linear_shape(module) is None:
            continue

        def hook(module: nn.Module, args: tuple, name: str = name) -> None:
            if args and args[0].shape[:-1].numel() == inputs["input_ids"].numel():
                found.add(name)

        handles.append(module.register_forward_pre_hook(hook))
    whole = base_model(model)
    try:
        on_device = {name: tensor.to(input_device(whole)) for name, tensor in inputs.items()}
        _forward(whole, on_device, [("",)])
    finally:
        for handle in handles:
            handle.remove()
    return found


def shared_inputs(model: nn.Module, modules: Sequence[str], ids: list[int]) -> list[tuple[str, ...]]:
    """Modules that are given the same tensor, together.

    Args:
        model: as in [`KeptDirections.find`].
        modules: names of linear modules in the base model.
        ids: some tokens.

    Raises:
        FNSFTError: one is not linear, or is not reached.
    """
    if not modules:
        raise FNSFTError("no linear module is named whose inputs could have directions; name at least one")
    for name in modules:
        if linear_shape(module_named(model, name)) is None:
            kind = type(module_named(model, name)).__name__
            raise FNSFTError(f"{name} is a {kind}; only inputs of linear layers have directions")
    given: dict[str, torch.Tensor] = {}  # held until all are known, so that no two have one identity
    handles = []
    for name in modules:

        def hook(module: nn.Module, args: tuple, name: str = name) -> None:
            given[name] = args[0]

        handles.append(module_named(model, name).register_forward_pre_hook(hook))
    try:
        for inputs, _, _ in batches_of([ids[:_PROBE]], 1):
            run_taps(model, [(name,) for name in modules], inputs, lambda group, rows: None)
    finally:
        for handle in handles:
            handle.remove()
    together: dict[int, list[str]] = {}
    for name in modules:
        together.setdefault(id(given[name]), []).append(name)
    return [tuple(names) for names in together.values()]
