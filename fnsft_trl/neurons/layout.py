"""NeuronLayout: which entries of which parameters make up neuron j. Everything that touches weights reads it here."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat.deepspeed import gathered, is_partitioned
from ..compat.peft import ParamWrapper
from ..errors import FNSFTError


@dataclass(frozen=True)
class WeightSlice:
    """Where the neurons of a site live in one parameter.

    A parameter counts *positions* along `dims`: along one dimension, or, when it holds all experts of a layer, along
    the experts and the rows (or columns) of each, flattened. A neuron has one position for each offset. The n-th
    neuron of the parameter is unit `n % units` of expert `n // units`; a plain layer is a single expert.

    Attributes:
        module_name (`str`): name of the module within the model.
        parameter (`str`): name of the parameter within the module, for instance `"weight"`.
        dims (`tuple[int, ...]`): the dimensions of the parameter that count positions, ascending.
        offsets (`tuple[int, ...]`): `(0,)`; where gate and up share a parameter, `(0, units)`, or `(0, 1)` when they
            take turns.
        side (`str`): `"output"` when the neurons are outputs of the layer, `"input"` when they are its inputs.
        count (`int`): how many neurons the parameter holds.
        units (`int`): how many of them belong to one expert.
        first (`int`): number of the first of them within the site.
        step (`int`): positions from one unit to the next.
    """

    module_name: str
    parameter: str
    dims: tuple[int, ...]
    offsets: tuple[int, ...]
    side: str
    count: int
    units: int
    first: int = 0
    step: int = 1

    @property
    def full_name(self) -> str:
        """The parameter's name within the model."""
        return f"{self.module_name}.{self.parameter}"

    @property
    def dim(self) -> int:
        """The one dimension that counts positions.

        Raises:
            FNSFTError: there are two of them.
        """
        if len(self.dims) > 1:
            raise FNSFTError(
                f"{self.full_name} holds all experts of its layer, so its neurons lie along two dimensions; the "
                "weight of a plain linear layer was expected"
            )
        return self.dims[0]

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """The parameter, from the model in which the site was found; of a layer with an adapter, the base weight."""
        module = model.get_submodule(self.module_name)
        if isinstance(module, ParamWrapper):  # PEFT's LoRA on bare parameters, which does not show them
            module = module.get_base_layer()
        return getattr(module, self.parameter)

    def among(self, neurons: torch.Tensor) -> torch.Tensor:
        """Those of some of the site's neurons that have entries in this parameter, in their order, shape (among,)."""
        return neurons[(neurons >= self.first) & (neurons < self.first + self.count)]

    def indices(self, neurons: torch.Tensor) -> torch.Tensor:
        """Positions of the given neurons; all of the first offset, then all of the next.

        Args:
            neurons: numbers of neurons of the site, shape (m,). Those without a part in this parameter are left out.

        Returns:
            Integer tensor, shape (among * len(offsets),).
        """
        numbers = self.among(neurons) - self.first
        positions = numbers // self.units * (self.units * len(self.offsets)) + numbers % self.units * self.step
        return torch.cat([positions + offset for offset in self.offsets])

    def mask(self, neurons: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """`True` at every entry of the given neurons; of a shape that broadcasts to the parameter's."""
        return mask_positions(parameter, self.dims, self.indices(neurons))

    def select(self, parameter: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A copy of the entries at some positions, shape (positions, ...)."""
        return select_positions(parameter, self.dims, positions)

    def touched(self, entries: torch.Tensor) -> torch.Tensor:
        """Numbers of the neurons that have any of the entries.

        Args:
            entries: bool tensor, of the parameter's shape.

        Returns:
            Integer tensor, shape (neurons,), ascending.
        """
        neurons = torch.arange(self.first, self.first + self.count)
        rows = self.select(entries, self.indices(neurons).to(entries.device))  # (offsets * neurons, ...)
        any_entry = rows.reshape(len(self.offsets), self.count, -1).any(-1).any(0)  # (neurons,)
        return neurons[any_entry.cpu()]


def whole_values(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter; gathered where FSDP or ZeRO-3 has sharded it: all processes must make the call."""
    values = parameter.detach()
    if isinstance(values, DTensor):
        return values.full_tensor()
    if not is_partitioned(parameter):
        return values
    with gathered([parameter]):
        return parameter.detach().clone()


def check_whole(model: nn.Module, what: str) -> None:
    """Check that a process holds a model as a whole: where others hold parts, each of its passes waits for theirs.

    Args:
        model: the model.
        what: reads it, for the message.

    Raises:
        FNSFTError: one of its parameters is sharded, with its name.
    """
    sharded = (name for name, each in model.named_parameters() if isinstance(each, DTensor) or is_partitioned(each))
    if (name := next(sharded, None)) is not None:
        raise FNSFTError(
            f"{what} reads a model that each process holds as a whole, and {name} is sharded (FSDP, ZeRO-3, tensor "
            "parallelism); do it before the model is sharded, or in one process that spreads it (device_map)"
        )


def mask_positions(tensor: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """`True` at some positions along (flattened) dimensions; of a shape that broadcasts to the tensor's."""
    shape = [size if dim in dims else 1 for dim, size in enumerate(tensor.shape)]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[positions.cpu()] = True
    return mask.to(tensor.device)


def select_positions(tensor: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """A copy of the entries at some positions along (flattened) dimensions, shape (positions, ...)."""
    if len(dims) == 1:
        return tensor.index_select(dims[0], positions).movedim(dims[0], 0)
    front, index = _front(tensor, dims, positions)
    return front[index]


def write_positions(
    tensor: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor, values: torch.Tensor
) -> None:
    """Overwrite the entries at some positions with values of the shape that [`select_positions`] gives."""
    if len(dims) == 1:  # where neurons are columns, several times faster than the general way
        # Copying columns from a transposed view takes many times as long as transposing first.
        tensor.index_copy_(dims[0], positions, values.movedim(0, dims[0]).contiguous())
    else:
        front, index = _front(tensor, dims, positions)
        front.index_put_(index, values)


def _front(tensor: torch.Tensor, dims: tuple[int, ...], positions: torch.Tensor):
    front = tensor.movedim(dims, tuple(range(len(dims))))
    return front, torch.unravel_index(positions, front.shape[: len(dims)])


@dataclass(frozen=True)
class NeuronLayout:
    """Which entries of which parameters make up the neurons of one site.

    Attributes:
        width (`int`): number of neurons.
        slices (`tuple[WeightSlice, ...]`): every parameter that holds a part of them.
    """

    width: int
    slices: tuple[WeightSlice, ...]

    def modules(self) -> list[str]:
        """Names of the modules that hold a part of the neurons, each once, in order."""
        return list(dict.fromkeys(part.module_name for part in self.slices))
