"""NeuronMask: a set of neurons, and the one check that it fits a model."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from ..errors import FNSFTError
from ..ranges import format_ranges, parse_ranges
from .sites import SITES, NeuronSite, find_neuron_sites


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """A set of neurons.

    Masks over the same layers combine with `|`, `&` and `~`; the complement is taken within those layers.

    Attributes:
        layers (`dict[int, torch.Tensor]`): layer -> bool tensor, shape (neurons of the layer,), `True` for members.
        site (`str`): the site whose neurons these are.

    Raises:
        FNSFTError: no such site, or layers that are something else.
    """

    layers: dict[int, torch.Tensor]
    site: str = "mlp_intermediate"

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise FNSFTError(f"the site of a NeuronMask is {self.site!r}; it must be one of: {', '.join(SITES)}")
        if not isinstance(self.layers, Mapping):
            raise FNSFTError(
                f"the layers of a NeuronMask are a {type(self.layers).__name__}; expected a mapping of each layer's "
                "number to a bool tensor of shape (neurons,)"
            )
        for layer, members in self.layers.items():
            if not isinstance(layer, Integral) or isinstance(layer, bool):
                raise FNSFTError(f"a layer of a NeuronMask is called {layer!r}; expected its number")
            if not isinstance(members, torch.Tensor) or members.dtype != torch.bool or members.dim() != 1:
                is_tensor = isinstance(members, torch.Tensor)
                found = f"{members.dtype} of shape {tuple(members.shape)}" if is_tensor else type(members).__name__
                raise FNSFTError(
                    f"layer {layer} of a NeuronMask is {found}; expected a bool tensor of shape (neurons,)"
                )

    @property
    def count(self) -> int:
        """Number of neurons in the set."""
        return sum(int(members.sum()) for members in self.layers.values())

    @property
    def fraction(self) -> float:
        """Share of the neurons of its layers that are in the set, in [0, 1]."""
        return self.count / max(1, sum(len(members) for members in self.layers.values()))

    @property
    def sha256(self) -> str:
        """SHA-256 over site, layers and members: equal masks have equal hashes."""
        digest = hashlib.sha256(self.site.encode())
        for layer, members in sorted(self.layers.items()):
            digest.update(f"{layer}:{len(members)}:".encode())
            digest.update(members.cpu().numpy().tobytes())
        return digest.hexdigest()

    def indices(self, layer: int) -> torch.Tensor:
        """Numbers of the members in one layer, ascending, shape (members,).

        Raises:
            FNSFTError: the mask does not cover that layer.
        """
        if not isinstance(layer, Integral) or layer not in self.layers:
            raise FNSFTError(f"the mask does not cover layer {layer!r}; its layers are {format_ranges(self.layers)}")
        return self.layers[layer].nonzero().flatten()

    def to_ranges(self) -> dict[str, str]:
        """The members as text: layer -> `"0-5,9"`; layers without a member are left out."""
        return {str(i): format_ranges(self.indices(i).tolist()) for i, m in self.layers.items() if m.any()}

    @classmethod
    def from_ranges(cls, ranges: dict[str, str], widths: dict[int, int], site: str) -> "NeuronMask":
        """The inverse of `to_ranges`, given the width of every layer.

        Raises:
            FNSFTError: a layer or a neuron is out of range, or none.
        """
        if not isinstance(ranges, dict):
            raise FNSFTError(f"neurons are {type(ranges).__name__}; a mapping of layers to ranges was expected")
        layers = {layer: torch.zeros(width, dtype=torch.bool) for layer, width in widths.items()}
        numbers = {str(layer): layer for layer in layers}
        for layer, spec in ranges.items():
            number = numbers.get(str(layer))
            if number is None:
                raise FNSFTError(
                    f"neurons of layer {layer} are selected, but the layers are {format_ranges(layers)}; name these"
                )
            layers[number][parse_ranges(spec, widths[number], what="neuron")] = True
        return cls(layers, site)

    def over(self, widths: dict[int, int]) -> "NeuronMask":
        """The same members over other layers; a layer that this mask does not cover has none.

        Args:
            widths: layer -> number of its neurons; every layer of the mask is among them.
        """
        empty = {layer: torch.zeros(width, dtype=torch.bool) for layer, width in widths.items()}
        return NeuronMask(empty | self.layers, self.site)

    def _aligned(self, other: "NeuronMask") -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        check_mask(other, "what a NeuronMask is combined with")
        shapes, others = ({i: len(m) for i, m in mask.layers.items()} for mask in (self, other))
        if shapes != others or self.site != other.site:
            raise FNSFTError(
                f"masks of different layers, widths or sites do not combine: {self.site} {shapes} and {other.site} "
                f"{others}; take both from one model and site"
            )
        for layer in self.layers:
            yield layer, self.layers[layer], other.layers[layer]

    def __or__(self, other: "NeuronMask") -> "NeuronMask":
        return NeuronMask({layer: a | b for layer, a, b in self._aligned(other)}, self.site)

    def __and__(self, other: "NeuronMask") -> "NeuronMask":
        return NeuronMask({layer: a & b for layer, a, b in self._aligned(other)}, self.site)

    def __invert__(self) -> "NeuronMask":
        return NeuronMask({layer: ~members for layer, members in self.layers.items()}, self.site)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronMask) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return (
            f"NeuronMask({self.count} neurons, {self.fraction:.1%} of {len(self.layers)} layers, site={self.site!r})"
        )


def check_mask(mask: object, name: str = "the mask") -> None:
    """Check that what is given as a mask is one.

    Raises:
        FNSFTError: it is something else.
    """
    if not isinstance(mask, NeuronMask):
        raise FNSFTError(f"{name} is a {type(mask).__name__}; expected a NeuronMask, as select_neurons gives it")


def fitting_sites(model: nn.Module, mask: NeuronMask) -> list[NeuronSite]:
    """All sites of a model whose neurons a mask is of, checked against every layer of the mask.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT.
        mask: of any of its layers.

    Returns:
        The model's sites at `mask.site`, ordered by layer, those of layers that the mask does not cover too.

    Raises:
        FNSFTError: it is no mask, or has a layer that the model has not, or one of another width.
    """
    check_mask(mask)
    sites = find_neuron_sites(model, kind=mask.site)
    widths = {site.layer: site.width for site in sites}
    for layer, members in mask.layers.items():
        if widths.get(layer) != len(members):
            found = widths.get(layer, f"no such layer (its layers are {format_ranges(widths)})")
            raise FNSFTError(
                f"the mask has {len(members)} neurons in layer {layer}, the model {found}; it was made for another "
                "model"
            )
    return sites
