"""Neurons: where a model's MLP sites are, and which weights make up neuron j.

Sites are found by structure. A *block* is an element of a `ModuleList` in which any element contains an attention
module. Outside the attention subtrees of a block, a *down projection* is a linear layer that ends in the hidden size
and has, in the nearest container they share, an *up projection*: a linear layer from the hidden size to the width n of
the down projection's input (or to 2n, when up and gate are fused).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import parse_ranges
from .errors import FNSFTError


SITES = ("mlp_intermediate", "mlp_output")


@dataclass(frozen=True)
class WeightSlice:
    """Where the neurons of a site live in one parameter.

    Neuron j is at the indices `j + offset` (for each offset) of dimension `dim` of `module.<parameter>`.

    Attributes:
        module_name (`str`): name of the linear layer within the model.
        parameter (`str`): `"weight"` or `"bias"`.
        dim (`int`): the dimension of the parameter that counts neurons.
        offsets (`tuple[int, ...]`): `(0,)`, or `(0, n)` where gate and up are fused into one weight.
        side (`str`): `"output"` when the neurons are outputs of the layer, `"input"` when they are its inputs.
    """

    module_name: str
    parameter: str
    dim: int
    offsets: tuple[int, ...]
    side: str

    def indices(self, neurons: torch.Tensor) -> torch.Tensor:
        """Positions along `dim` of the given neurons; all of the first offset, then all of the next.

        Args:
            neurons: integer tensor, shape (m,).

        Returns:
            Integer tensor, shape (m * len(offsets),).
        """
        return torch.cat([neurons + offset for offset in self.offsets])


@dataclass(frozen=True)
class NeuronLayout:
    """Which rows and columns of which parameters make up the neurons of one site.

    Attributes:
        width (`int`): number of neurons.
        slices (`tuple[WeightSlice, ...]`): every parameter that holds a part of them.
    """

    width: int
    slices: tuple[WeightSlice, ...]

    def modules(self) -> list[str]:
        """Names of the linear layers that hold a part of the neurons, each once, in order."""
        return list(dict.fromkeys(part.module_name for part in self.slices))


@dataclass(frozen=True)
class NeuronSite:
    """One layer's MLP, at the place where its activations are read and masked.

    Attributes:
        name (`str`): name of the down projection within the model.
        layer (`int`): index of the block, counted over the whole model.
        width (`int`): number of neurons at the site.
        kind (`str`): `"mlp_intermediate"` or `"mlp_output"`.
        down (`nn.Module`): the down projection (the outermost wrapper, if PEFT has wrapped it).
        ups (`tuple[nn.Module, ...]`): the up projections: gate and up, or one of both fused, or a plain one.
        up_names (`tuple[str, ...]`): their names.
    """

    name: str
    layer: int
    width: int
    kind: str
    down: nn.Module = field(repr=False, compare=False)
    ups: tuple[nn.Module, ...] = field(repr=False, compare=False)
    up_names: tuple[str, ...] = ()

    @property
    def layout(self) -> NeuronLayout:
        """The weights that make up this site's neurons.

        At `mlp_intermediate`: the rows of the up projections (and their biases) and the column of the down
        projection. At `mlp_output`: the row of the down projection and the entry of its bias.
        """
        if self.kind == "mlp_output":
            return NeuronLayout(self.width, tuple(_output_slices(self.name, self.down, (0,))))
        parts: list[WeightSlice] = []
        for name, up in zip(self.up_names, self.ups, strict=True):
            fused = linear_shape(up)[1] == 2 * self.width
            parts += _output_slices(name, up, (0, self.width) if fused else (0,))
        parts.append(WeightSlice(self.name, "weight", 0 if _is_transposed(self.down) else 1, (0,), "input"))
        return NeuronLayout(self.width, tuple(parts))


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`; any other model is returned as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_modules_to_save(saved: list[str] | None, mlp_modules: list[str]) -> None:
    """Refuse to train as a whole a module that holds a part of the neurons.

    Raises:
        FNSFTError: naming the entry and the module.
    """
    for entry in saved or []:
        held = next((name for name in mlp_modules if f".{entry}." in f".{name}."), None)
        if held:
            raise FNSFTError(
                f"modules_to_save names {entry!r}, which holds {held}: its neurons would all train; leave MLP modules "
                "out of modules_to_save"
            )


def base_linear(module: nn.Module) -> nn.Module:
    """The plain layer inside a PEFT wrapper; any other module is returned as it is."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, `None` for any other module.

    Read from the attributes and never from the weight, whose shape is packed when it is quantised.
    """
    module = base_linear(module)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):  # bitsandbytes' layers are subclasses
        return module.in_features, module.out_features
    return None


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out) instead of (out, in)."""
    return isinstance(base_linear(module), Conv1D)


def _output_slices(name: str, module: nn.Module, offsets: tuple[int, ...]) -> Iterator[WeightSlice]:
    yield WeightSlice(name, "weight", 1 if _is_transposed(module) else 0, offsets, "output")
    if base_linear(module).bias is not None:
        yield WeightSlice(name, "bias", 0, offsets, "output")


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _contains_attention(module: nn.Module) -> bool:
    return any(_is_attention(child) for child in module.modules())


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Elements of the outermost `ModuleList`s of which any contains attention, with their names."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer) for outer in taken):
            continue
        if any(_contains_attention(child) for child in module):
            taken.append(f"{name}.")
            yield from ((f"{name}.{i}", child) for i, child in enumerate(module))


def _linears(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers below `root` outside attention, in definition order; what PEFT has wrapped counts as one layer."""
    for name, child in root.named_children():
        full_name = f"{prefix}.{name}"
        if linear_shape(child) is not None:
            yield full_name, child
        elif not _is_attention(child):
            yield from _linears(child, full_name)


def _expert_tensors(block: nn.Module) -> str | None:
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):  # its weights have three dimensions too
            continue
        if any(p.dim() == 3 for p in module.parameters(recurse=False)):
            return f"{name} ({type(module).__name__})"
    return None


def _mlp_of(block_name: str, block: nn.Module, hidden: int) -> tuple[str, list[str]] | None:
    """Names of the down projection and of its up projections, or `None` when the block has none."""
    linears = dict(_linears(block, block_name))
    shapes = {name: linear_shape(module) for name, module in linears.items()}
    found: dict[str, list[str]] = {}
    for name, (width, out) in shapes.items():
        if out != hidden:
            continue
        container = name
        while container != block_name:
            container = container.rpartition(".")[0]
            ups = [
                other
                for other, (n_in, n_out) in shapes.items()
                if other != name
                and other.startswith(f"{container}.")
                and n_in == hidden
                and n_out in (width, 2 * width)
            ]
            if ups:
                found[name] = ups
                break
    if not found:
        return None
    # With an intermediate size equal to the hidden size every projection looks like every other: the last one defined
    # is the down projection.
    names = list(found)
    square = all(shapes[name] == (hidden, hidden) for name in names)
    if len(names) > 1 and not square:
        raise FNSFTError(
            f"block {block_name} has several down projections ({', '.join(names)}); a block with more than one MLP is "
            "not understood"
        )
    return names[-1], found[names[-1]]


def _hidden_size(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if config is None:
        raise FNSFTError(f"{type(model).__name__} has no config; a transformers model was expected")
    hidden = getattr(config.get_text_config(), "hidden_size", None)
    if hidden is None:
        raise FNSFTError(
            f"no MLP site found in {type(model).__name__}: its config has no hidden_size; a transformer with MLP "
            "layers was expected"
        )
    return hidden


def find_neuron_sites(model: nn.Module, *, kind: str = "mlp_intermediate", layers="all") -> list[NeuronSite]:
    """Find the MLP sites of a transformer, one for each layer.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT.
        kind: `"mlp_intermediate"` (neurons) or `"mlp_output"` (channels of the MLP's output).
        layers: layer specification, see [`~fnsft_trl.config.parse_ranges`].

    Returns:
        A list of [`NeuronSite`], ordered by layer.

    Raises:
        FNSFTError: no site was found, some blocks have an MLP that the rule does not understand, or a layer is out
            of range.
    """
    if kind not in SITES:
        raise FNSFTError(f"site {kind!r} is unknown; it must be one of: {', '.join(SITES)}")
    hidden = _hidden_size(model)
    modules = dict(model.named_modules())
    blocks = list(_blocks(model))
    sites: list[NeuronSite] = []
    for layer, (block_name, block) in enumerate(blocks):
        if experts := _expert_tensors(block):
            raise FNSFTError(
                f"block {block_name} holds fused expert weights ({experts}); mixture-of-experts models are not "
                "supported yet"
            )
        mlp = _mlp_of(block_name, block, hidden)
        if mlp is None:
            raise FNSFTError(
                f"no MLP site found in block {block_name} ({type(block).__name__}) of {type(model).__name__}: "
                f"expected a linear layer into the hidden size ({hidden}) next to one that leads out of it"
            )
        down, ups = mlp
        width = linear_shape(modules[down])[0 if kind == "mlp_intermediate" else 1]
        site = NeuronSite(down, layer, width, kind, modules[down], tuple(modules[up] for up in ups), tuple(ups))
        sites.append(site)
    if not sites:
        raise FNSFTError(
            f"no MLP site found in {type(model).__name__}: it has no list of blocks with an attention module in each; "
            "a transformer with MLP layers was expected"
        )
    return [sites[i] for i in parse_ranges(layers, len(sites))]
