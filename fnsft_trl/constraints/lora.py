"""LoRA held to a NeuronMask.

With the weight change B A, a frozen output neuron needs a zero row of B and a frozen input neuron a zero column of A.
They start at zero, and masks on the output of `lora_B` and the input of `lora_A` keep their gradients at exactly
zero. Optimizers in full precision then leave them at zero (weight decay included); those with state in 8 bits do not,
so they are put back after every step. Where PEFT adapts a bare parameter (the experts of a layer), it uses the factors
without calling `lora_A` and `lora_B`: there the gradients of the frozen entries are zeroed as they are accumulated,
and so are those of the magnitudes of DoRA. Checkpoints are plain PEFT files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import FNSFTError
from ..neurons.layout import mask_positions, select_positions
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, WeightSlice
from .frozen import FrozenSlices
from .lora_config import check_lora_config
from .neurons import frozen_by_site


@dataclass(frozen=True)
class FactorSlice:
    """The factor of a LoRA adapter in which the neurons of a [`WeightSlice`] have entries of their own.

    With the weight change B A, output neurons have a row of B each, and input neurons a column of A. LoRA on the
    weights of E experts keeps the factors of all of them in one: A of shape (E * rank, in), B of shape
    (out, rank * E).

    Attributes:
        layer (`LoraLayer`): the layer that holds the factor.
        factor (`nn.Module`): `lora_A` or `lora_B` of the adapter.
        part (`WeightSlice`): where the neurons are in the base weight.
        shape (`tuple[int, ...]`): shape of the factor in which they lie along `dims`.
        dims (`tuple[int, ...]`): the dimensions that count their positions.
    """

    layer: LoraLayer
    factor: nn.Module
    part: WeightSlice
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def is_bare(self) -> bool:
        """Whether PEFT adapts a bare parameter, using the factor's weight without calling the factor."""
        return isinstance(self.layer, ParamWrapper)

    def positions(self, neurons: torch.Tensor) -> torch.Tensor:
        """Positions of neurons along `dims`, in the order of `part.indices`."""
        positions = self.part.indices(neurons)
        if len(self.dims) == 1 or self.part.side == "input":
            return positions
        out, _, experts = self.shape
        return positions % out * experts + positions // out  # B counts the experts last

    def rows(self, neurons: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the entries of some neurons, shape (positions, ...), from the factor's whole weight."""
        weight = weight.detach().view(self.shape)
        return select_positions(weight, self.dims, self.positions(neurons).to(weight.device))


def factor_slices(model: nn.Module, site: NeuronSite, adapter_name: str) -> Iterator[FactorSlice]:
    """Where the neurons of a site are in the factors of a LoRA adapter.

    Raises:
        FNSFTError: the adapter changes a parameter of the MLP in whose factors neurons have no entries of their own.
    """
    for part in site.layout.slices:
        layer = model.get_submodule(part.module_name)
        while isinstance(layer, ParamWrapper) and layer.parameter_name != part.parameter:
            layer = layer.base_layer
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        is_bare, is_bias = isinstance(layer, ParamWrapper), part.parameter.endswith("bias")
        is_quantised = not part.tensor(model).is_floating_point()
        if is_bare and (is_bias or is_quantised or isinstance(layer.get_base_layer(), Conv1D)):
            raise FNSFTError(
                f"LoRA on the bare parameter {part.full_name} cannot be held to a set of neurons, which have no "
                "entries of their own in its factors; name weights of experts, or modules (target_modules)"
            )
        if is_bias:
            continue
        factor = (layer.lora_B if part.side == "output" else layer.lora_A)[adapter_name]
        rows, columns = shape = factor.weight.shape
        dims = (0,) if part.side == "output" else (1,)
        if is_bare and len(part.dims) > 1:
            experts = layer.num_experts
            dims = (0, 2)
            if part.side == "output":
                shape = (rows, columns // experts, experts)
            else:
                shape = (experts, rows // experts, columns)
        yield FactorSlice(layer, factor, part, tuple(shape), dims)


def constrain_lora(model: nn.Module, trainable: NeuronMask, *, adapter_name: str = "default") -> FrozenSlices:
    """Hold an unmerged LoRA adapter to a set of neurons. Other targets of the adapter (attention) train as usual.

    Args:
        model: a `PeftModel` with LoRA on MLP modules, or on the weights of experts.
        trainable: the neurons that may change. Layers it does not cover are frozen.
        adapter_name: the adapter.

    Returns:
        The frozen slices of its factors. An optimizer with state in 8 bits moves zeros that have no gradient, and
        weight decay moves the magnitudes of DoRA: `attach` the result to the optimizer. For that, the model must be
        on its device when this is called.

    Raises:
        FNSFTError: the adapter has no MLP module, is of a variant that cannot be held, or already changes a neuron
            that should be frozen.
    """
    check_lora_config(model.peft_config[adapter_name], model, trainable.site)
    slices = FrozenSlices()
    adapted = trained = 0
    for site, frozen in frozen_by_site(model, trainable):
        for found in factor_slices(model, site, adapter_name):
            part = found.part
            adapted += 1
            trained += part.count - len(part.among(frozen))
            if not part.tensor(model).is_floating_point():
                found.layer.merge = _refuse_merge(part.module_name)
            _freeze_factor(slices, found, adapter_name, frozen)
    if adapted == 0:
        raise FNSFTError(f"adapter {adapter_name!r} has no LoRA on an MLP module, so there is no neuron to train")
    if trained == 0:
        raise FNSFTError(
            f"no trainable neuron lies in a layer that adapter {adapter_name!r} adapts, so none could train; adapt "
            "other layers, or select other neurons"
        )
    return slices


@torch.no_grad()
def _freeze_factor(slices: FrozenSlices, found: FactorSlice, adapter_name: str, frozen: torch.Tensor) -> None:
    """Zero the frozen neurons' entries of a factor, and keep their gradients at zero."""
    weight, positions = found.factor.weight, found.positions(frozen)
    view = weight.view(found.shape)
    is_frozen = mask_positions(view, found.dims, positions)
    a, b = found.layer.lora_A[adapter_name].weight, found.layer.lora_B[adapter_name].weight
    experts = found.layer.num_experts if found.is_bare else 1
    only_frozen = (view * is_frozen).view(weight.shape)
    if _changes_anything(*((a, only_frozen) if weight is b else (only_frozen, b)), experts):
        raise _already_changed(found)
    view.masked_fill_(is_frozen, 0)
    if found.is_bare:
        slices.freeze(weight, found.dims, positions, shape=found.shape)
        letter = "lora_B" if found.part.side == "output" else "lora_A"
        _check_is_trained(found, letter, adapter_name, weight)
        return
    slices.freeze(weight, found.dims, positions, zero_gradients=False)
    if adapter_name in getattr(found.layer, "lora_magnitude_vector", {}):
        _freeze_magnitude(slices, found, adapter_name, positions)
    if found.part.side == "output":
        found.factor.register_forward_hook(_mask_output(is_frozen.flatten()))
    else:
        found.factor.register_forward_pre_hook(_mask_input(is_frozen.flatten()))


def _freeze_magnitude(slices: FrozenSlices, found: FactorSlice, adapter_name: str, positions: torch.Tensor) -> None:
    """Hold the frozen rows' magnitudes of DoRA at the norms of the base weight's rows.

    At those that a merge computes: it adds the weight change first, which is more precise than a base in half
    precision, from whose rounded norms PEFT has started. The quotient of the two must be exactly 1.
    """
    dora = found.layer.lora_magnitude_vector[adapter_name]
    weight = dequantize_module_weight(found.layer.get_base_layer())
    shape = found.layer.out_features, found.layer.in_features
    present = dora.weight[positions]
    started, merged = (
        dora.get_weight_norm(weight, weight.new_zeros(shape, dtype=dtype), 1)[positions].to(present)
        for dtype in (weight.dtype, found.factor.weight.dtype)
    )
    if not torch.equal(present, started) and not torch.equal(present, merged):
        raise _already_changed(found)
    dora.weight[positions] = merged
    slices.freeze(dora.weight, (0,), positions)
    _check_is_trained(found, "lora_magnitude_vector", adapter_name, dora.weight)


def _already_changed(found: FactorSlice) -> FNSFTError:
    return FNSFTError(
        f"the LoRA adapter already changes neurons of {found.part.module_name} that should be frozen; merge it into "
        "the base model, or start from a new adapter"
    )


def _check_is_trained(found: FactorSlice, holder: str, adapter_name: str, weight: nn.Parameter) -> None:
    """Stop training where another tensor has taken the place of one whose gradients are masked."""
    name = found.part.full_name

    def check(layer: nn.Module, args: tuple) -> None:  # a copy of the model has this hook too, with its own layer
        present = getattr(layer, holder)[adapter_name].weight
        if present is not weight and torch.is_grad_enabled() and present.requires_grad:
            raise FNSFTError(
                f"the LoRA weight on {name} was replaced (by sharding, or in a copy of the model) since "
                "constrain_lora masked its gradients; use plain data parallelism, and copy a model before "
                "constrain_lora, not after"
            )

    found.layer.register_forward_pre_hook(check)


def _changes_anything(a: torch.Tensor, b: torch.Tensor, experts: int) -> bool:
    """Whether the weight change B A is more than the rounding of factors that are orthogonal to each other."""
    if not (a.any() and b.any()):
        return False
    change = torch.einsum("ore,eri->eoi", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1]))
    return bool(change.norm() > 1e-5 * a.norm() * b.norm())


def _refuse_merge(name: str):
    def merge(*args, **kwargs):
        raise FNSFTError(
            f"LoRA cannot be merged into {name}, which is quantised: it would be quantised anew, frozen neurons "
            "included; load the base model unquantised, load the adapter, then merge"
        )

    return merge


def _mask_input(is_frozen: torch.Tensor):
    return lambda module, args: (args[0].masked_fill(is_frozen.to(args[0].device), 0), *args[1:])


def _mask_output(is_frozen: torch.Tensor):
    return lambda module, args, output: output.masked_fill(is_frozen.to(output.device), 0)
