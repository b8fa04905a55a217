"""ProtectedWeights: trained linear maps that go on answering as before to inputs along given directions.

With the change D of a weight, shape (out, in), and orthonormal directions U, shape (in, m), D U = 0 holds after every
step of the optimizer:

    LoRA, D = B A                       A <- A (I - U U^T)
    rows of neuron deltas               the same; a bias answers to every input, and stays zero
    columns C at the inputs S           D U = C^T U_S, so C <- (I - Q Q^T) C with Q an orthonormal basis of U_S
    the weight W = W0 + D               W <- W - (W U - W0 U) U^T, for which W0 U is kept and not W0. At the end once
                                        more in float64, or the rounding of a float32 product is left along U.

Where a part of the entries is frozen (other neurons), the rest is projected by itself, so that frozen ones keep their
bits. A strength s below 1 takes the part s of what each step adds along U out, and leaves the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from ..compat.torch import exact, full_products
from ..errors import FNSFTError
from ..finite import largest
from ..interventions.restoring import LoraChange
from .momentum import plain_optimizer
from .trained_maps import TrainedMap


_RANK = 1e-6  # singular values of U_S below this are no direction
_ROWS = 4096  # of a weight, of which a float64 copy is made at a time


@dataclass(eq=False)
class ProtectedWeight:
    """One trained map with its directions.

    Attributes:
        map ([`TrainedMap`]): the map.
        basis (`torch.Tensor`): orthonormal columns, shape (inputs that train, m), on its device, in float32 or
            the precision of the parameter.
        whole (`torch.Tensor`): all of them, shape (in, m), float64, on the CPU, by which the result is measured.
        reference (`torch.Tensor`, *optional*): W0 U where the parameter holds the base, shape (rows, m).
    """

    map: TrainedMap
    basis: torch.Tensor
    whole: torch.Tensor = field(repr=False)
    reference: torch.Tensor | None = None
    _before: torch.Tensor | None = None

    @classmethod
    def of(cls, found: TrainedMap, whole: torch.Tensor, shared: dict[tuple, torch.Tensor]) -> ProtectedWeight:
        """Put directions on the device of a map; maps that read one input share them.

        Args:
            found: the map.
            whole: orthonormal columns, shape (in, m), float64.
            shared: what was put there before.
        """
        device = found.parameter.device
        if found.inputs is None:
            key = (id(whole), device)
            if key not in shared:
                shared[key] = whole.to(device, _precision(found.parameter)).contiguous()
            basis = shared[key]
        else:
            left, singular, _ = torch.linalg.svd(whole[found.inputs.cpu()], full_matrices=False)
            basis = left[:, singular > _RANK].to(device, _precision(found.parameter)).contiguous()
        protected = cls(found, basis, whole)
        if found.holds_base:
            protected.reference = protected.exact_along().to(basis.dtype).to(device)
        return protected

    @property
    def is_closed(self) -> bool:
        """Whether the directions leave nothing of the inputs that train, so that nothing can change."""
        return self.basis.shape[1] >= self.basis.shape[0]

    @property
    def _dims(self) -> tuple[int, int]:
        """(dimension of the inputs, dimension of the outputs) in the parameter."""
        return (0, 1) if self.map.is_transposed else (1, 0)

    def _part(self) -> torch.Tensor:
        """The entries that train, shape (rows, inputs): a view where that are all, else a copy."""
        values = self.map.parameter.detach()
        of_inputs, of_rows = self._dims
        if self.map.inputs is not None and not self.map.is_subset:
            values = values.index_select(of_inputs, self.map.inputs.to(values.device))
        if self.map.rows is not None:
            values = values.index_select(of_rows, self.map.rows.to(values.device))
        return values.T if self.map.is_transposed else values

    def _subtract(self, amount: torch.Tensor, scale: float) -> None:
        """Subtract `scale * amount @ basis.T` from the entries that train, in the precision of `amount`."""
        values, part = self.map.parameter.detach(), self._part()
        of_inputs, of_rows = self._dims
        if part.dtype == amount.dtype:
            part.addmm_(amount, self.basis.T.to(amount), alpha=-scale)
        else:
            basis = self.basis.T.to(amount)
            for rows, along in zip(part.split(_ROWS), amount.split(_ROWS), strict=True):
                rows.copy_(rows.to(along).addmm(along, basis, alpha=-scale))
        part = part.T if self.map.is_transposed else part  # of which all but a view is put back
        if self.map.inputs is not None and not self.map.is_subset:
            values.index_copy_(of_inputs, self.map.inputs.to(values.device), part.contiguous())
        elif self.map.rows is not None:
            values.index_copy_(of_rows, self.map.rows.to(values.device), part.contiguous())

    def _along(self) -> torch.Tensor:
        """What the entries that train have along the directions, shape (rows, m)."""
        return self._part().to(self.basis.dtype) @ self.basis

    def exact_along(self) -> torch.Tensor:
        """The same in float64, on the CPU where the device knows no float64."""
        basis = exact(self.basis)
        return torch.cat([exact(rows) @ basis for rows in self._part().split(_ROWS)])

    def _follow(self) -> None:
        """Bring what is kept to where the parameter is by now."""
        device = self.map.parameter.device
        if self.basis.device != device:
            self.basis = self.basis.to(device)
            self.reference = None if self.reference is None else self.reference.to(device)

    def note(self) -> None:
        """Note what there is along the directions before a step, of which a part is left."""
        self._follow()
        self._before = self._along()

    def project(self, strength: float) -> None:
        """Take out what was added along the directions since the base, or with a strength below 1 since `note`."""
        self._follow()
        for other in self.map.others:
            other.detach().zero_()
        if self.is_closed:
            if not self.map.holds_base:
                self.map.parameter.detach().zero_()
            return
        along = self._along()
        before = self.reference if strength == 1 else self._before
        self._subtract(along if before is None else along - before.to(along), strength)

    def settle(self) -> None:
        """Take out of a weight what rounding has left along the directions, in float64 and with one rounding."""
        self._follow()
        if self.map.holds_base and not self.is_closed:
            along = self.exact_along()
            self._subtract(along - exact(self.reference), 1.0)

    def left(self) -> tuple[float, float]:
        """Norms of D U and of what it is compared with: D, or the weight where that holds the base. In float64."""
        values = self.map.parameter.detach()
        if self.map.factor is not None:
            return LoraChange(values.cpu(), self.map.factor.detach().cpu()).left_in(self.whole)
        along = self.exact_along()
        if self.reference is not None:
            along = along - exact(self.reference)
        return float(along.norm()), float(values.norm(dtype=torch.float64 if values.device.type != "mps" else None))


def _precision(parameter: torch.Tensor) -> torch.dtype:
    """In which a parameter is projected."""
    return torch.promote_types(parameter.dtype, torch.float32)


class ProtectedWeights:
    """All trained maps of a model with their directions. Made by [`protect_weights`].

    Attributes:
        weights (`list[ProtectedWeight]`): of each map.
        strength (`float`): as in [`protect_weights`].
    """

    def __init__(self, weights: list[ProtectedWeight], strength: float) -> None:
        self.weights, self.strength = weights, strength

    def attach(self, optimizer: Optimizer) -> None:
        """Have every step of an optimizer followed by the projection. To be called before others that put values back
        after a step."""
        optimizer = plain_optimizer(optimizer)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    @torch.no_grad()
    def before_step(self) -> None:
        """Note what there is along the directions, with a strength below 1."""
        if self.strength < 1:
            with full_products():
                for weight in self.weights:
                    weight.note()

    @torch.no_grad()
    def after_step(self) -> None:
        """Project what a step has changed."""
        with full_products():
            for weight in self.weights:
                weight.project(self.strength)

    @torch.no_grad()
    def settle(self) -> None:
        """Project weights once more at the end of a training, with no more than one rounding of each entry."""
        if self.strength == 1:
            for weight in self.weights:
                weight.settle()

    @torch.no_grad()
    def left(self) -> float:
        """The largest ||D U|| / ||D|| of any map; of one that holds the base, ||D U|| / ||W||."""
        pairs = [weight.left() for weight in self.weights]
        return largest(along / whole for along, whole in pairs if whole)

    @property
    def closed(self) -> list[str]:
        """Names of modules of which the directions leave nothing that could train."""
        return [weight.map.module for weight in self.weights if weight.is_closed]

    @property
    def memory(self) -> int:
        """Bytes of directions and of what is kept of the base weights."""
        tensors = [t for w in self.weights for t in (w.basis, w.reference) if t is not None]
        return sum(size for size in {t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@torch.no_grad()
def protect_weights(
    maps: Sequence[TrainedMap], bases: Mapping[str, torch.Tensor], *, strength: float = 1.0
) -> ProtectedWeights:
    """Protect trained maps, from now on and after every step of the optimizer that the result is attached to.

    Args:
        maps: with the values that they have before training. A LoRA's A is projected at once; its B is still zero.
        bases: module -> orthonormal directions of its input, shape (in, m), float64. Modules that read one input are
            to have one tensor.
        strength: how much of what a step adds along the directions is taken out, in (0, 1].

    Raises:
        FNSFTError: a LoRA or a delta has a change along the directions already, or nothing is left that could train.
    """
    shared: dict[tuple, torch.Tensor] = {}
    weights = [ProtectedWeight.of(each, bases[each.module], shared) for each in maps]
    found = ProtectedWeights(weights, strength)
    for weight in weights:
        along, whole = (0.0, 0.0) if weight.map.holds_base else weight.left()
        if strength == 1 and not along <= 1e-4 * whole:  # as of NaN
            raise FNSFTError(
                f"the adapter on {weight.map.module} has {along / whole:.1%} of its change along the directions to "
                "protect already; take that back by fnsft restore, or merge it, so that it is a part of the base"
            )
    if len(found.closed) == len(weights):
        narrow = min(weights, key=lambda weight: weight.basis.shape[0])
        raise FNSFTError(
            f"the directions to protect fill all inputs that train, of {narrow.map.module} all "
            f"{narrow.basis.shape[0]}, so nothing could change; give a smaller protect_dims, or train more neurons"
        )
    for weight in weights:
        for other in weight.map.others:
            other.requires_grad_(False)
        if weight.is_closed:
            weight.map.parameter.requires_grad_(False)
    with full_products():
        for weight in weights:
            factor = weight.map.factor
            if not weight.map.holds_base and (strength == 1 or factor is None or not factor.any()):
                weight.project(strength)
    return found
