"""Experts: the routed experts of one mixture-of-experts layer, their weights and a way to their activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..compat.transformers import EXPERTS_FORM, apply_gate, is_expert_parallel
from ..errors import FNSFTError
from .layout import WeightSlice


_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

# (activations of one expert (tokens, units), number of the expert, numbers of the tokens routed to it (tokens,))
# -> the activations to go on with, or `None` to leave them.
ExpertTap = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor | None]
# (name of the weight, number of the expert, inputs (tokens, in)) -> outputs (tokens, out)
ExpertProjection = Callable[[str, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: a module with the weights of all of them in parameters of three dimensions.

    Neuron `e * units + j` is unit j of expert e.

    Attributes:
        name (`str`): name of the module within the model.
        module (`nn.Module`): the module.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        form = vars(self.module)
        tensors = dict(self.module.named_parameters(recurse=False))
        problem = None
        if any(flag not in form for flag in EXPERTS_FORM) or not {self.up_name, "down_proj"} <= tensors.keys():
            problem = "is not of the form that transformers' experts interface describes"
        elif any(t.dim() != 3 or not t.is_floating_point() for t in (tensors[self.up_name], tensors["down_proj"])):
            problem = "is quantised"
        elif form["has_post_expert_norm"]:
            problem = "puts a norm between the down projection and the output"
        elif is_expert_parallel(self.module):
            problem = "is spread over several processes"
        if problem:
            raise FNSFTError(
                f"the experts {self.name} ({type(self.module).__name__}) are not understood: the module {problem}; "
                "expected were gate_up_proj (or up_proj) and down_proj with one matrix for each expert"
            )

    @staticmethod
    def are_in(module: nn.Module) -> bool:
        """Whether a module holds the weights of several experts, in whatever form."""
        if isinstance(module, _CONVOLUTIONS):  # its weights have three dimensions too
            return False
        return "is_concatenated" in vars(module) or any(p.dim() == 3 for p in module.parameters(recurse=False))

    @property
    def up_name(self) -> str:
        """Name of the parameter with the up projections, and the gates if there are any."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def units(self) -> int:
        """Number of neurons of one expert."""
        return self.module.down_proj.shape[1 if self.module.is_transposed else 2]

    @property
    def width(self) -> int:
        """Number of neurons of all experts."""
        return len(self.module.down_proj) * self.units

    def neuron_slices(self) -> list[WeightSlice]:
        """Where the neurons are: rows of the up (and gate) projections, columns of the down projections."""
        module, units, up = self.module, self.units, self.up_name
        if not module.has_gate:
            offsets, step = (0,), 1
        elif module.is_concatenated:
            offsets, step = (0, units), 1
        else:
            offsets, step = (0, 1), 2
        rows, columns = ((0, 2), (0, 1)) if module.is_transposed else ((0, 1), (0, 2))
        parts = [WeightSlice(self.name, up, rows, offsets, "output", self.width, units, step=step)]
        if module.has_bias:
            parts.append(WeightSlice(self.name, f"{up}_bias", (0, 1), offsets, "output", self.width, units, step=step))
        return [*parts, WeightSlice(self.name, "down_proj", columns, (0,), "input", self.width, units)]

    def output_slices(self) -> list[WeightSlice]:
        """Where the output channels are: a row of every down projection, and an entry of every bias."""
        dim = 2 if self.module.is_transposed else 1
        hidden = self.module.down_proj.shape[dim]
        parts = [WeightSlice(self.name, "down_proj", (dim,), (0,), "output", hidden, hidden)]
        if self.module.has_bias:
            parts.append(WeightSlice(self.name, "down_proj_bias", (1,), (0,), "output", hidden, hidden))
        return parts

    def tap(self, function: ExpertTap, enabled: Callable[[], bool]) -> ExpertTapHandle:
        """Call a function, in every forward pass while it is enabled, on what enters each expert's down projection.

        The activations are the neurons' own, without the weight that the router gives the expert.
        """
        forward = _tapped_forward(self.module)
        if forward is None:
            forward = _TappedForward(self.module)
            self.module.forward = forward
        return ExpertTapHandle(forward, (function, enabled))


def expert_taps(module: nn.Module) -> list[ExpertTap]:
    """The functions that tap a module, switched on or not; none where it is no experts module."""
    forward = _tapped_forward(module)
    return [] if forward is None else [function for function, _ in forward.taps]


def _tapped_forward(module: nn.Module) -> _TappedForward | None:
    """What stands in for a module's forward; where accelerate has put another one before it, under another name."""
    return next((value for value in vars(module).values() if isinstance(value, _TappedForward)), None)


class ExpertTapHandle:
    """A function on the activations of experts, to be taken away with `remove`."""

    def __init__(self, forward: _TappedForward, tap: tuple) -> None:
        self._forward, self._tap = forward, tap
        forward.taps.append(tap)

    def remove(self) -> None:
        """Take the function away; with the last one, the module gets its own forward back."""
        if self._tap in self._forward.taps:
            self._forward.taps.remove(self._tap)
            self._forward.restore()


def forward_set_on(module: nn.Module) -> Callable | None:
    """The forward that was set on one module alone, in place of its class's; taps of experts aside."""
    forward = vars(module).get("forward")
    if isinstance(forward, _TappedForward):
        forward = forward.was_own
    # accelerate, when it takes its hooks away, leaves the class's forward there
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


class _TappedForward:
    """Stands in for the forward of an experts module as long as its activations are tapped.

    A hook on the module would only see its input and output, and the faster implementations of transformers compute
    all experts in one operation. While no tap is enabled the module's own forward runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.was_own = vars(module).get("forward")  # set by others on this one module, as accelerate does
        self.taps: list[tuple[ExpertTap, Callable[[], bool]]] = []

    @property
    def own(self) -> Callable:
        """The module's own forward."""
        return type(self.module).forward.__get__(self.module) if self.was_own is None else self.was_own

    def restore(self) -> None:
        """Give the module its own forward back, unless a tap is left."""
        if self.taps or vars(self.module).get("forward") is not self:
            return
        del self.module.forward
        if self.was_own is not None:
            self.module.forward = self.was_own

    def enabled(self) -> list[ExpertTap]:
        """The functions that are to be called at present."""
        return [function for function, enabled in self.taps if enabled()]

    def __call__(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not self.enabled():
            return self.own(hidden_states, chosen, weights)
        return expert_by_expert(self.module, hidden_states, chosen, weights)


def expert_by_expert(
    module: nn.Module,
    hidden_states: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    project: ExpertProjection | None = None,
) -> torch.Tensor:
    """The forward pass of an experts module, one expert after the other, with the taps that are enabled.

    Args:
        module: a module of the form that [`Experts`] describes.
        hidden_states: shape (tokens, hidden).
        chosen: numbers of the experts, shape (tokens, experts per token).
        weights: the router's, shape (tokens, experts per token).
        project: computes the projections; [`project_expert`] by default.

    Returns:
        Outputs, shape (tokens, hidden).
    """
    forward = _tapped_forward(module)
    taps = [] if forward is None else forward.enabled()
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    if project is None:

        def project(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            return project_expert(module, name, expert, x)

    output = torch.zeros_like(hidden_states)
    for expert in range(len(module.down_proj)):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        values = project(up_name, expert, hidden_states[tokens])
        values = apply_gate(module, values) if module.has_gate else module.act_fn(values)  # (tokens, units)
        for function in taps:
            changed = function(values, expert, tokens)
            values = values if changed is None else changed
        result = project("down_proj", expert, values) * weights[tokens, slots, None]
        output.index_add_(0, tokens, result.to(output.dtype))
    return output


def expert_weight(module: nn.Module, name: str, expert: int) -> torch.Tensor:
    """One expert's matrix of a weight, as a view of shape (out, in)."""
    weight = getattr(module, name)[expert]
    return weight.T if module.is_transposed else weight


def project_expert(module: nn.Module, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's projection of x, shape (tokens, in), by the weight of a name and its bias, if there is one."""
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(x, expert_weight(module, name, expert), bias)
