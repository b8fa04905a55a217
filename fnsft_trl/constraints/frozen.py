"""FrozenSlices: parts of parameters that an optimizer may not change."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..compat.torch import compute_local_shape_and_global_offset, version_counter
from ..errors import FNSFTError
from ..neurons.layout import WeightSlice, mask_positions, select_positions, write_positions
from .momentum import check_momenta, clear_momenta, plain_optimizer


@dataclass(eq=False)
class FrozenSlice:
    """The frozen positions of one parameter, and the values that they keep.

    Attributes:
        parameter (`nn.Parameter`): the parameter.
        dims (`tuple[int, ...]`): the dimensions that count positions.
        positions (`torch.Tensor`): the positions along them, shape (m,). Of a sharded parameter (`DTensor`), those of
            this process's shard.
        shape (`tuple[int, ...]`, *optional*): the shape to view the parameter in.
        home (`tuple[nn.Module, str]`, *optional*): the module that the parameter is in, and its name there.
        lasting (`bool`): whether the values stay, even where others are loaded.
        values (`torch.Tensor`): their values, shape (m, ...).
    """

    parameter: nn.Parameter
    dims: tuple[int, ...]
    positions: torch.Tensor
    shape: tuple[int, ...] | None = None
    home: tuple[nn.Module, str] | None = None
    lasting: bool = False
    values: torch.Tensor = field(init=False)
    _written: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.values, self._written = select_positions(self.view, self.dims, self.positions), self._mark()

    @property
    def view(self) -> torch.Tensor:
        """The parameter, or this process's shard of it, in its shape."""
        local = _local(self.parameter.detach())
        return local if self.shape is None else local.view(self.shape)

    @property
    def mask(self) -> torch.Tensor:
        """`True` at the frozen positions; of a shape that broadcasts to that of `view`."""
        return mask_positions(self.view, self.dims, self.positions)

    def note(self) -> None:
        """Take the present values, where something else than an optimizer has written the parameter.

        Raises:
            FNSFTError: another tensor is in the parameter's place, or other values where they are to last.
        """
        if self.home is not None and getattr(*self.home) is not self.parameter:
            raise FNSFTError(
                f"the parameter {self.home[1]!r} of a {type(self.home[0]).__name__} was replaced (by sharding, or by "
                "load_state_dict with assign=True) since constrain_full, which holds the one before; call it again, "
                "and make the optimizer after that"
            )
        if self._mark() == self._written and torch.equal(self._sample(), self._sample(of_values=True)):
            return
        values = select_positions(self.view, self.dims, self.positions)
        if not self.lasting:
            self.values = values
        elif not torch.allclose(values, self.values.to(values)):
            raise FNSFTError(
                "LoRA weights that change frozen neurons were loaded after constrain_lora; load them before, so that "
                "they are checked"
            )
        self._written = self._mark()

    def zero_gradient(self) -> None:
        """Zero the gradient of the positions, where the parameter has one."""
        if self.parameter.grad is not None:
            gradient = _local(self.parameter.grad)
            (gradient if self.shape is None else gradient.view(self.shape)).masked_fill_(self.mask, 0)

    def restore(self) -> None:
        """Write the noted values."""
        write_positions(self.view, self.dims, self.positions, self.values)
        self._written = self._mark()

    def _mark(self) -> tuple[int, int]:
        """What changes when the parameter is written to, other than through `.data`, or gets other memory."""
        view = self.view
        return version_counter(view), view.data_ptr()

    def _sample(self, *, of_values: bool = False) -> torch.Tensor:
        """One entry of every position: they show what was written through `.data`."""
        if of_values:
            return self.values.flatten(1)[:, :1].flatten() if self.values.dim() > 1 else self.values
        view = self.view
        for dim in set(range(view.dim())) - set(self.dims):
            view = view.narrow(dim, 0, min(1, view.shape[dim]))
        return select_positions(view, self.dims, self.positions).flatten()


# What holds a module's weights at present: of full fine-tuning by the model, of LoRA by the factor.
_HOLDERS: "weakref.WeakKeyDictionary[nn.Module, FrozenSlices]" = weakref.WeakKeyDictionary()
# What holds some of a module's weights for a while, on top of that.
_GUESTS: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[FrozenSlices]]" = weakref.WeakKeyDictionary()


class FrozenSlices:
    """Slices of parameters that stay bit-identical. Made by [`constrain_full`] and [`constrain_lora`].

    Every step of an optimizer that it is attached to leaves them as it found them. So weights may be loaded before
    training or between two steps, and are held from then on.

    Attributes:
        slices (`list[FrozenSlice]`): those of every partly frozen parameter.
    """

    def __init__(self) -> None:
        self.slices: list[FrozenSlice] = []
        self._hooks = []
        self._masks_gradients = False
        self._in_step = False

    def freeze_neurons(
        self, model: nn.Module, part: WeightSlice, neurons: torch.Tensor, *, for_a_while: bool = False
    ) -> None:
        """Freeze those of a site's neurons that have a part in one parameter.

        Args:
            model: the model in which the site was found.
            part: which entries of which parameter belong to which neuron. With all of its neurons frozen, the
                parameter no longer requires a gradient.
            neurons: numbers of the neurons, shape (m,).
            for_a_while: whether they are to be released again.
        """
        parameter = part.tensor(model)
        count = len(part.among(neurons))
        if count == part.count and not for_a_while:
            parameter.requires_grad_(False)
        elif count:
            home = model.get_submodule(part.module_name), part.parameter
            if for_a_while:
                _GUESTS.setdefault(home[0], weakref.WeakSet()).add(self)
            self.freeze(parameter, part.dims, part.indices(neurons), home=home)

    def freeze(
        self,
        parameter: nn.Parameter,
        dims: tuple[int, ...],
        positions: torch.Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        home: tuple[nn.Module, str] | None = None,
        lasting: bool = False,
        zero_gradients: bool = True,
    ) -> None:
        """Note the values of some positions, to be put back, and zero their gradients as they are accumulated.

        Args:
            parameter, dims, positions, shape, home, lasting: see [`FrozenSlice`]; positions in the whole parameter.
            zero_gradients: `False` where something else keeps the gradients at zero.

        Raises:
            FNSFTError: see [`check_freezable`].
        """
        local = _local_positions(parameter, dims, positions.to(parameter.device))
        frozen = FrozenSlice(parameter, dims, local, shape, home, lasting)
        self.slices.append(frozen)
        if not zero_gradients:
            return
        mask = frozen.mask

        def zero_gradient(parameter: nn.Parameter) -> None:
            gradient = _local(parameter.grad)
            (gradient if shape is None else gradient.view(shape)).masked_fill_(mask, 0)

        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)  # without, as in an adapter that is not active yet, there can be no hook
        self.add_hook(parameter.register_post_accumulate_grad_hook(zero_gradient))
        parameter.requires_grad_(requires_grad)
        self._masks_gradients = True

    def add_hook(self, hook) -> None:
        """Take over the handle of a hook, which `release` removes."""
        self._hooks.append(hook)

    def take_over(self, modules: Iterable[nn.Module]) -> None:
        """Hold some modules in the place of what held any of them before, which is released."""
        for module in modules:
            before = _HOLDERS.get(module)
            if before is not None and before is not self:
                before.release()
            _HOLDERS[module] = self

    @property
    def masks_gradients(self) -> bool:
        """Whether frozen positions depend on gradients that are zeroed as they are accumulated."""
        return self._masks_gradients

    def attach(self, optimizer: Optimizer) -> None:
        """Have every step of this optimizer leave the frozen values as it finds them."""
        optimizer = plain_optimizer(optimizer)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    @torch.no_grad()
    def before_step(self) -> None:
        """Note values that were loaded since the last step of an optimizer.

        Raises:
            FNSFTError: see [`FrozenSlice.note`].
        """
        if self._in_step:  # the last one was broken off, and may have moved some
            self.restore()
        for frozen in self.slices:
            frozen.note()
        self._in_step = True

    def after_step(self) -> None:
        """Put the noted values back after a step of an optimizer."""
        self.restore()
        self._in_step = False

    @torch.no_grad()
    def restore(self) -> None:
        """Write the noted values of the frozen positions."""
        for frozen in self.slices:
            frozen.restore()

    def release(self) -> None:
        """Let all positions train again."""
        for hook in self._hooks:
            hook.remove()
        self.slices, self._hooks, self._masks_gradients = [], [], False

    @torch.no_grad()
    def clear_momentum(self, optimizer: Optimizer) -> None:
        """Zero the momentum of the frozen positions. Running means of squared gradients stay.

        Raises:
            FNSFTError: see [`~fnsft_trl.constraints.momentum.check_momenta`]; nothing is cleared then.
        """
        for frozen in self.slices:
            check_momenta(optimizer, frozen.parameter)
        for frozen in self.slices:
            mask = frozen.mask
            if frozen.shape is not None:
                mask = mask.expand(frozen.shape).reshape(frozen.parameter.shape)
            clear_momenta(optimizer, frozen.parameter, mask)


@torch.no_grad()
def zero_frozen_gradients(model: nn.Module) -> None:
    """Zero what was added to the gradients of a model's frozen positions by other means than a backward pass."""
    holders = {_HOLDERS[module] for module in model.modules() if module in _HOLDERS}
    holders |= {guest for module in model.modules() for guest in _GUESTS.get(module, ())}
    for holder in holders:
        for frozen in holder.slices:
            frozen.zero_gradient()


def check_freezable(parameter: torch.Tensor, dims: tuple[int, ...]) -> None:
    """Check that positions along some dimensions of a parameter can be frozen.

    Raises:
        FNSFTError: they lie along several dimensions of one that is sharded.
    """
    if isinstance(parameter, DTensor) and len(dims) > 1:
        raise FNSFTError(
            "expert weights that are sharded (FSDP) cannot be held to neurons yet; use plain data parallelism"
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_positions(parameter: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """The positions that lie in this process's shard, counted within it."""
    check_freezable(parameter, dims)
    if not isinstance(parameter, DTensor):
        return positions
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = positions - offset[dims[0]]
    return local[(local >= 0) & (local < shape[dims[0]])]
