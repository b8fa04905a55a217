"""LoRA held to a NeuronMask.

With the weight change B A, a frozen output neuron needs a zero row of B and a frozen input neuron a zero column of A.
They start at zero, and masks on the output of `lora_B` and the input of `lora_A` keep their gradients at exactly
zero. Optimizers in full precision then leave them at zero (weight decay included); those with state in 8 bits do not,
so they are put back after every step. Where PEFT adapts a bare parameter (the experts of a layer), it uses the factors
without calling `lora_A` and `lora_B`. There the gradients of the frozen entries are zeroed as they are accumulated,
and so are those of the magnitudes of DoRA. Checkpoints are plain PEFT files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn
from transformers import Conv1D

from ..compat.peft import LoraLayer, ParamWrapper, dequantize_module_weight
from ..compat.torch import guard_hooks, remove_forward_hooks
from ..errors import FNSFTError
from ..neurons.layout import mask_positions, select_positions
from ..neurons.mask import NeuronMask, fitting_sites
from ..neurons.sites import NeuronSite, WeightSlice, linear_shape
from .frozen import FrozenSlices, check_freezable
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
        layer = _adapting_layer(model, part, adapter_name)
        if layer is None:
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
        columns, rows = linear_shape(factor)  # not that of the weight, which is empty under ZeRO-3
        shape = rows, columns
        dims = (0,) if part.side == "output" else (1,)
        if is_bare and len(part.dims) > 1:
            experts = layer.num_experts
            dims = (0, 2)
            if part.side == "output":
                shape = (rows, columns // experts, experts)
            else:
                shape = (experts, rows // experts, columns)
        yield FactorSlice(layer, factor, part, shape, dims)


def _adapting_layer(model: nn.Module, part: WeightSlice, adapter_name: str) -> LoraLayer | None:
    """The layer by which an adapter changes a parameter, or the module that the parameter is of."""
    layer = model.get_submodule(part.module_name)
    while isinstance(layer, ParamWrapper) and layer.parameter_name != part.parameter:
        layer = layer.base_layer
    return layer if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A else None


def reached_neurons(model: nn.Module, neurons: NeuronMask, adapter_names: Iterable[str]) -> NeuronMask:
    """Those of some neurons that LoRA can change: its targets hold a weight of theirs, be it one of several.

    Args:
        model: a `PeftModel`.
        neurons: the neurons that are asked of.
        adapter_names: the adapters that train.

    Returns:
        Members of `neurons`, over all layers of the model.
    """
    layers = {}
    for site in fitting_sites(model, neurons):
        reached = torch.zeros(site.width, dtype=torch.bool)
        for part in site.layout.slices:
            if any(_adapting_layer(model, part, name) is not None for name in adapter_names):
                reached[part.first : part.first + part.count] = True
        layers[site.layer] = reached & neurons.layers.get(site.layer, torch.zeros_like(reached))
    return NeuronMask(layers, neurons.site)


def constrain_lora(model: nn.Module, trainable: NeuronMask, *, adapter_name: str = "default") -> FrozenSlices:
    """Hold an unmerged LoRA adapter to a set of neurons. Other targets of the adapter (attention) train as usual.

    An adapter is held to one set at a time: a second call takes the place of the first. Load an adapter's weights
    before it.

    Args:
        model: a `PeftModel` with LoRA on MLP modules, or on the weights of experts.
        trainable: the neurons that may change. Layers it does not cover are frozen.
        adapter_name: the adapter.

    Returns:
        The frozen slices of its factors. An optimizer with state in 8 bits moves zeros that have no gradient, and
        weight decay moves the magnitudes of DoRA: `attach` the result to the optimizer. For that, the model must be
        on its device when this is called.

    Raises:
        FNSFTError: there is no such adapter, it has no MLP module, is of a variant that cannot be held, or already
            changes a neuron that should be frozen. The model is left as it was.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise FNSFTError(f"the model has no LoRA adapter {adapter_name!r}; wrap it by get_peft_model first")
    check_lora_config(config, model, trainable.site)
    factors = []
    trained = 0
    for site, frozen in frozen_by_site(model, trainable):
        for found in factor_slices(model, site, adapter_name):
            trained += found.part.count - len(found.part.among(frozen))
            factors.append(_FrozenFactor(model, found, adapter_name, frozen))
    if not factors:
        raise FNSFTError(
            f"adapter {adapter_name!r} has no LoRA on an MLP module, so there is no neuron to train; add these to "
            "target_modules"
        )
    if trained == 0:
        raise FNSFTError(
            f"no trainable neuron lies in a layer that adapter {adapter_name!r} adapts, so none could train; adapt "
            "other layers, or select other neurons"
        )
    guard_hooks()
    slices = FrozenSlices()
    slices.take_over(factor.found.factor for factor in factors)
    for factor in factors:
        factor.freeze(slices)
    return slices


class _FrozenFactor:
    """The frozen neurons' entries of a factor: checked when this is made, so that `freeze` cannot fail."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, found: FactorSlice, adapter_name: str, frozen: torch.Tensor) -> None:
        self.found = found
        self.adapter_name = adapter_name
        self.weight = weight = found.factor.weight
        self.positions = found.positions(frozen)
        self.is_quantised = not found.part.tensor(model).is_floating_point()
        check_freezable(weight, found.dims)
        view = weight.view(found.shape)
        self.is_frozen = mask_positions(view, found.dims, self.positions)
        a, b = found.layer.lora_A[adapter_name].weight, found.layer.lora_B[adapter_name].weight
        experts = found.layer.num_experts if found.is_bare else 1
        only_frozen = (view * self.is_frozen).view(weight.shape)
        if _changes_anything(*((a, only_frozen) if weight is b else (only_frozen, b)), experts):
            raise _already_changed(found)
        self.magnitudes = self._magnitudes()

    def _magnitudes(self) -> torch.Tensor | None:
        """What the frozen rows' magnitudes of DoRA are held at: the norms of the base weight's rows.

        Those that a merge computes: it adds the weight change first, which is more precise than a base in half
        precision, from whose rounded norms PEFT has started. The quotient of the two must be exactly 1.
        """
        layer, found = self.found.layer, self.found
        if found.is_bare or self.adapter_name not in getattr(layer, "lora_magnitude_vector", {}):
            return None
        dora = layer.lora_magnitude_vector[self.adapter_name]
        weight = dequantize_module_weight(layer.get_base_layer())
        shape = layer.out_features, layer.in_features
        present = dora.weight[self.positions]
        started, merged = (
            dora.get_weight_norm(weight, weight.new_zeros(shape, dtype=dtype), 1)[self.positions].to(present)
            for dtype in (weight.dtype, self.weight.dtype)
        )
        if not torch.equal(present, started) and not torch.equal(present, merged):
            raise _already_changed(found)
        return merged

    @torch.no_grad()
    def freeze(self, slices: FrozenSlices) -> None:
        """Zero the entries, and keep their gradients at zero."""
        found, weight, positions = self.found, self.weight, self.positions
        if self.is_quantised:
            found.layer.merge = _refuse_merge(found.part.module_name)
        weight.view(found.shape).masked_fill_(self.is_frozen, 0)
        if found.is_bare:
            slices.freeze(weight, found.dims, positions, shape=found.shape, lasting=True)
            slices.add_hook(self._check_is_trained("lora_B" if found.part.side == "output" else "lora_A", weight))
            return
        slices.freeze(weight, found.dims, positions, zero_gradients=False, lasting=True)
        if self.magnitudes is not None:
            magnitude = found.layer.lora_magnitude_vector[self.adapter_name].weight
            magnitude[positions] = self.magnitudes
            slices.freeze(magnitude, (0,), positions, lasting=True)
            slices.add_hook(self._check_is_trained("lora_magnitude_vector", magnitude))
        remove_forward_hooks(found.factor, _FactorMask)  # a copy of a model that was held has its hooks
        mask = self.is_frozen.flatten()
        if found.part.side == "output":
            slices.add_hook(found.factor.register_forward_hook(_OutputMask(mask)))
        else:
            slices.add_hook(found.factor.register_forward_pre_hook(_InputMask(mask)))

    def _check_is_trained(self, holder: str, weight: nn.Parameter):
        """Stop training where another tensor has taken the place of one whose gradients are masked."""
        name, adapter_name = self.found.part.full_name, self.adapter_name

        def check(layer: nn.Module, args: tuple) -> None:  # a copy of the model has this hook too, with its own layer
            present = getattr(layer, holder)[adapter_name].weight
            if present is not weight and torch.is_grad_enabled() and present.requires_grad:
                raise FNSFTError(
                    f"the LoRA weight on {name} was replaced (by sharding, or in a copy of the model) since "
                    "constrain_lora masked its gradients; use plain data parallelism, and copy a model before "
                    "constrain_lora, not after"
                )

        return self.found.layer.register_forward_pre_hook(check)


def _already_changed(found: FactorSlice) -> FNSFTError:
    return FNSFTError(
        f"the LoRA adapter already changes neurons of {found.part.module_name} that should be frozen; merge it into "
        "the base model, or start from a new adapter"
    )


def _changes_anything(a: torch.Tensor, b: torch.Tensor, experts: int) -> bool:
    """Whether the weight change B A is more than the rounding of factors that are orthogonal to each other."""
    if not (a.any() and b.any()):
        return False
    a, b = a.float(), b.float()  # products of half precision may be 0, and norms infinite
    change = torch.einsum("ore,eri->eoi", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1]))
    return not bool(change.norm() <= 1e-5 * a.norm() * b.norm())  # NaN changes something


def _refuse_merge(name: str):
    def merge(*args, **kwargs):
        raise FNSFTError(
            f"LoRA cannot be merged into {name}, which is quantised: it would be quantised anew, frozen neurons "
            "included; load the base model unquantised, load the adapter, then merge"
        )

    return merge


@dataclass(eq=False)
class _FactorMask:
    is_frozen: torch.Tensor

    def on(self, values: torch.Tensor) -> torch.Tensor:
        """The mask where the values are; it is moved there once."""
        if self.is_frozen.device != values.device:
            self.is_frozen = self.is_frozen.to(values.device)
        return self.is_frozen


class _InputMask(_FactorMask):
    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return args[0].masked_fill(self.on(args[0]), 0), *args[1:]


class _OutputMask(_FactorMask):
    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(self.on(output), 0)
