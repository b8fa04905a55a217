"""Neurons: where a model's MLP sites are, and how to reach their activations.

Sites are found by structure. A *block* is an element of a `ModuleList` in which any element contains an attention
module. In a model of text and images only the text model's blocks count. The attention subtrees of a block are left
out. Elsewhere in it, a *down projection* is a linear layer that ends in the hidden size and has an *up projection* in
the nearest container they share. That is a linear layer from the hidden size to the width n of the down projection's
input (or to 2n, when up and gate are fused). A module with the weights of several experts makes the block a mixture of
experts. Linear layers beside it are then the shared expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from peft import PeftModel
from torch import nn
from transformers import Conv1D, PreTrainedModel

from ..compat.peft import BaseTunerLayer
from ..compat.torch import guard_hooks
from ..config import SITES
from ..errors import FNSFTError
from ..ranges import parse_ranges
from .experts import Experts
from .layout import NeuronLayout, WeightSlice
from .taps import ActivationFunction, InputTap, OutputTap, UnitsTap, WrappingCheck


@dataclass(frozen=True)
class NeuronSite:
    """One layer's MLP, at the place where its activations are read and masked.

    In a mixture of experts, neuron `e * units + j` is unit j of the routed expert e; the units of a shared expert come
    after all of them. The router has no neurons. Output channels are those of the whole MLP, routed and shared experts
    together.

    Attributes:
        name (`str`): name of the down projection within the model; of the whole MLP in a mixture of experts.
        layer (`int`): index of the block, counted over the whole model, encoder blocks before decoder blocks.
        width (`int`): number of neurons at the site.
        kind (`str`): `"mlp_intermediate"` or `"mlp_output"`.
        output (`nn.Module`): the module whose output is the MLP's: the down projection (the outermost wrapper, if PEFT
            has wrapped it), or the whole MLP in a mixture of experts.
        down (`nn.Module` or `None`): the down projection (of the shared expert); `None` if all experts are routed.
        around (`nn.Module` or `None`): the module that the down projection is a child of.
        ups (`tuple[nn.Module, ...]`): the up projections: gate and up, or one of both fused, or a plain one.
        down_name (`str`), up_names (`tuple[str, ...]`): their names.
        experts (`Experts` or `None`): the routed experts.
    """

    name: str
    layer: int
    width: int
    kind: str
    output: nn.Module = field(repr=False, compare=False)
    down: nn.Module | None = field(default=None, repr=False, compare=False)
    around: nn.Module | None = field(default=None, repr=False, compare=False)
    ups: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    down_name: str = ""
    up_names: tuple[str, ...] = ()
    experts: Experts | None = None

    @property
    def layout(self) -> NeuronLayout:
        """The weights that make up this site's neurons.

        At `mlp_intermediate`: the rows of the up projections (and their biases) and the column of the down
        projection. At `mlp_output`: the row of the down projection and the entry of its bias, of every expert.
        """
        parts: list[WeightSlice] = []
        if self.kind == "mlp_output":
            if self.experts:
                parts += self.experts.output_slices()
            if self.down is not None:
                parts += _output_slices(self.down_name, self.down, self.width)
            return NeuronLayout(self.width, tuple(parts))
        if self.experts:
            parts += self.experts.neuron_slices()
        if self.down is not None:
            first = self.experts.width if self.experts else 0
            units = self.width - first
            for name, up in zip(self.up_names, self.ups, strict=True):
                parts += _output_slices(name, up, units, first)
            dim = 0 if _is_transposed(self.down) else 1
            parts.append(WeightSlice(self.down_name, "weight", (dim,), (0,), "input", units, units, first))
        return NeuronLayout(self.width, tuple(parts))

    def tap(self, function: ActivationFunction, enabled: Callable[[], bool] = lambda: True) -> list:
        """Call a function on the site's activations in every forward pass, until the returned handles are removed.

        It is called several times in one pass of a mixture of experts: for every routed expert that has tokens, with
        these, and for the shared expert. The activation of a routed expert's neuron is what enters the down
        projection, without the weight that the router gives the expert; for the tokens of other experts it counts as
        0.

        Args:
            function: see [`ActivationFunction`]. It must be pure: gradient checkpointing calls it twice.
            enabled: asked in every pass whether to call it.

        Returns:
            Handles with a `remove` method.
        """
        guard_hooks()
        if self.kind == "mlp_output":
            tap = OutputTap(function, enabled, slice(0, self.width))
            handles = [self.output.register_forward_hook(tap)]
            return handles + self._check_wrapping(tap) if self.output is self.down else handles
        handles: list = []
        first = 0
        if self.experts:
            first = self.experts.width
            handles.append(self.experts.tap(UnitsTap(function, self.experts.units), enabled))
        if self.down is not None:
            tap = InputTap(function, enabled, slice(first, self.width))
            handles += [self.down.register_forward_pre_hook(tap), *self._check_wrapping(tap)]
        return handles

    def _check_wrapping(self, tap: InputTap | OutputTap) -> list:
        """Have a pass refused in which an adapter was put around the tapped down projection since."""
        if self.around is None:
            return []
        check = WrappingCheck(self.down_name.rpartition(".")[2], tap)
        return [self.around.register_forward_pre_hook(check)]


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, a compiled or a distributed one; any other is returned as it is.

    Raises:
        FNSFTError: it is no model.
    """
    if isinstance(model, PeftModel):
        return model.get_base_model()
    if not isinstance(model, nn.Module):
        raise FNSFTError(
            f"the model is a {type(model).__name__}; expected a loaded one, as AutoModelForCausalLM.from_pretrained "
            "gives it"
        )
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def check_in_memory(model: nn.Module, what: str) -> None:
    """Check that all weights of a model are in memory, and none is offloaded to be loaded for each use.

    Args:
        model: the model; of one that its processes shard, none is loaded so.
        what: needs them, for the message.

    Raises:
        FNSFTError: one is not, with its name.
    """
    spread = getattr(base_model(model), "hf_device_map", None)  # set by transformers where a device_map was given
    if spread and (name := next((name for name, each in model.named_parameters() if each.is_meta), None)) is not None:
        raise FNSFTError(
            f"{what} needs all weights in memory, and {name} is offloaded (device_map); spread the model over devices "
            "that hold it, or load it in few bits (load_in_4bit)"
        )


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


def _output_slices(name: str, module: nn.Module, units: int, first: int = 0) -> Iterator[WeightSlice]:
    """Where the outputs of a linear layer are, which are `units` neurons, or gate and up of as many."""
    offsets = (0,) if linear_shape(module)[1] == units else (0, units)
    yield WeightSlice(name, "weight", (1 if _is_transposed(module) else 0,), offsets, "output", units, units, first)
    if base_linear(module).bias is not None:
        yield WeightSlice(name, "bias", (0,), offsets, "output", units, units, first)


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _contains_attention(module: nn.Module) -> bool:
    return any(_is_attention(child) for child in module.modules())


def _blocks(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Elements of the outermost `ModuleList`s of which any contains attention, with their names."""
    taken: list[str] = []
    for name, module in model.named_modules(prefix=prefix):
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
        elif not _is_attention(child) and not isinstance(child, BaseTunerLayer):
            yield from _linears(child, full_name)


def _experts_of(block_name: str, block: nn.Module) -> Experts | None:
    """The routed experts of a block, or `None` when it is no mixture of experts."""
    found = [name for name, module in block.named_modules(prefix=block_name) if Experts.are_in(module)]
    if len(found) > 1:
        raise FNSFTError(
            f"block {block_name} has several modules with the weights of experts ({', '.join(found)}); one was "
            "expected"
        )
    if not found:
        return None
    module = block.get_submodule(found[0][len(block_name) + 1 :])
    name = found[0]
    while name.endswith(".base_layer"):  # adapters wrap the module, LoRA on bare parameters once for each of them
        name = name.removesuffix(".base_layer")
    return Experts(name, module)


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


def _text_model(model: nn.Module) -> tuple[str, nn.Module, int]:
    """Name, module and hidden size of the text model: the whole model, unless its config has one for text apart."""
    config = getattr(model, "config", None)
    if config is None:
        raise FNSFTError(f"{type(model).__name__} has no config; a transformers model was expected")
    text_config = config.get_text_config()
    hidden = getattr(text_config, "hidden_size", None)
    if hidden is None:
        raise FNSFTError(
            f"no MLP site found in {type(model).__name__}: its config has no hidden_size; a transformer with MLP "
            "layers was expected"
        )
    if text_config is config or config.is_encoder_decoder:
        return "", model, hidden
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config is text_config:
            return name, module, hidden
    raise FNSFTError(
        f"no MLP site found in {type(model).__name__}: its config describes a text model "
        f"({type(text_config).__name__}), but none of its modules was made from that; a model of text, or of text and "
        "images, was expected"
    )


def _site(block_name: str, block: nn.Module, layer: int, hidden: int, kind: str) -> NeuronSite | None:
    """The site of one block, or `None` when the block has no MLP."""
    experts = _experts_of(block_name, block)
    mlp = _mlp_of(block_name, block, hidden)
    prefix = len(block_name) + 1
    linear = {}
    width = 0
    if mlp:
        down_name, up_names = mlp
        down = block.get_submodule(down_name[prefix:])
        ups = tuple(block.get_submodule(name[prefix:]) for name in up_names)
        around = block.get_submodule(down_name[prefix:].rpartition(".")[0])
        linear = {"down": down, "around": around, "ups": ups, "down_name": down_name, "up_names": tuple(up_names)}
        width = linear_shape(down)[0]
    if not experts:
        if not mlp:
            return None
        return NeuronSite(down_name, layer, width if kind == "mlp_intermediate" else hidden, kind, down, **linear)
    name = experts.name.rpartition(".")[0]
    if mlp and not down_name.startswith(f"{name}."):
        raise FNSFTError(
            f"block {block_name} has experts ({experts.name}) and an MLP outside of {name} ({down_name}); a block "
            "with more than one MLP is not understood"
        )
    width = experts.width + width if kind == "mlp_intermediate" else hidden
    return NeuronSite(name, layer, width, kind, block.get_submodule(name[prefix:]), **linear, experts=experts)


def _check_no_weight_is_shared(sites: list[NeuronSite]) -> None:
    """Refuse blocks that share an MLP: a neuron of one would be a neuron of the other too."""
    owners: dict[int, int] = {}  # identity of a weight -> layer
    for site in sites:
        linears = [base_linear(module) for module in (site.down, *site.ups) if module is not None]
        weights = [linear.weight for linear in linears]
        if site.experts:
            weights += [getattr(site.experts.module, name) for name in (site.experts.up_name, "down_proj")]
        for weight in weights:
            if owners.setdefault(id(weight), site.layer) != site.layer:
                raise FNSFTError(
                    f"the MLPs of layers {owners[id(weight)]} and {site.layer} share a weight, so that neither has "
                    "neurons of its own; such a model is not understood"
                )


def find_neuron_sites(
    model: nn.Module, *, kind: str = "mlp_intermediate", layers: str | list[int] = "all"
) -> list[NeuronSite]:
    """Find the MLP sites of a transformer, one for each layer.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT. Of a model of text and images, only the text
            model is searched.
        kind: `"mlp_intermediate"` (neurons) or `"mlp_output"` (channels of the MLP's output).
        layers: layer specification, see [`~fnsft_trl.ranges.parse_ranges`].

    Returns:
        A list of [`NeuronSite`], ordered by layer.

    Raises:
        FNSFTError: no site was found, some blocks have an MLP that the rule does not understand or share one, or a
            layer is out of range.
    """
    if kind not in SITES:
        raise FNSFTError(f"site {kind!r} is unknown; it must be one of: {', '.join(SITES)}")
    prefix, text_model, hidden = _text_model(model)
    sites: list[NeuronSite] = []
    for layer, (block_name, block) in enumerate(_blocks(text_model, prefix)):
        site = _site(block_name, block, layer, hidden, kind)
        if site is None:
            raise FNSFTError(
                f"no MLP site found in block {block_name} ({type(block).__name__}) of {type(model).__name__}: "
                f"expected a linear layer into the hidden size ({hidden}) next to one that leads out of it"
            )
        sites.append(site)
    if not sites:
        raise FNSFTError(
            f"no MLP site found in {type(model).__name__}: it has no list of blocks with an attention module in each; "
            "a transformer with MLP layers was expected"
        )
    _check_no_weight_is_shared(sites)
    return [sites[i] for i in parse_ranges(layers, len(sites))]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, in the order in which the layers of its sites are counted."""
    prefix, text_model, _ = _text_model(model)
    return [block for _, block in _blocks(text_model, prefix)]
