"""check_tensors: that the tensors of a template are what its files may hold, however it was made.

No torch until tensors are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import FNSFTError
from .description import SIDES
from .storage import are_statistics


if TYPE_CHECKING:
    import torch

_ORTHONORMAL = 1e-3  # largest difference of an entry of U U^T from that of the identity; float32 rounds by far less
_AGAIN = "discover the networks again, in float32"


def check_tensors(template) -> None:
    """Check the tensors of a template: layers, types, shapes and values.

    Args:
        template: a [`~fnsft_trl.template.template.FunctionalNetworkTemplate`].

    Raises:
        FNSFTError: layers that lack a part, other types than float32 and float64, shapes that do not fit, values that
            are NaN or infinite, an RMS that is less than the mean, or directions that are not orthonormal.
    """
    if bool(template.mean) != bool(template.rms):
        raise FNSFTError("a template has the mean and the RMS of its neurons, or neither; give both")
    for name in ("mean", "rms", "basis"):
        layers = getattr(template, name).keys()
        if layers and layers != template.loadings.keys():
            raise FNSFTError(
                f"a template has the {name} of layers {sorted(layers)} and loadings of {sorted(template.loadings)}; "
                "give both of the same layers"
            )
    for name, layer, values, shape in _parts(template):
        _check(f"the {name} of layer {layer}", values, shape)
    for layer in template.mean:
        if not are_statistics(template.mean[layer], template.rms[layer]):
            raise FNSFTError(f"the rms of layer {layer} cannot be that of activations with that mean; {_AGAIN}")
    for layer, sides in template.basis.items():
        for side, rows in sides.items():
            squares = rows.double() @ rows.double().T
            squares.diagonal().sub_(1)
            if squares.abs().max() > _ORTHONORMAL:
                raise FNSFTError(f"the directions ({side}) of layer {layer} are not orthonormal; {_AGAIN}")


def _parts(template) -> Iterator[tuple[str, int, torch.Tensor, tuple[int | None, ...]]]:
    """Yield name, layer and tensor of each part, with its shape; `None` stands for any number but 0."""
    for layer, values in template.loadings.items():
        yield "loadings", layer, values, (len(template.components), None)
    widths = {layer: values.shape[-1] for layer, values in template.loadings.items()}
    for name in ("mean", "rms"):
        for layer, values in getattr(template, name).items():
            yield name, layer, values, (widths[layer],)
    for layer, sides in template.basis.items():
        if set(sides) != set(SIDES):
            raise FNSFTError(f"the basis of layer {layer} has {sorted(sides)}; it must have {' and '.join(SIDES)}")
        for side, rows in sides.items():
            yield side, layer, rows, (None, widths[layer] if side == "basis" else None)


def _check(what: str, values: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    import torch

    if values.dtype not in (torch.float32, torch.float64):
        raise FNSFTError(f"{what} are {values.dtype}; give float32 or float64")
    is_shape = values.ndim == len(shape) and values.numel() > 0
    if not is_shape or any(wanted not in (None, found) for found, wanted in zip(values.shape, shape, strict=True)):
        wanted = " x ".join("any" if number is None else str(number) for number in shape)
        raise FNSFTError(f"{what} have the shape {tuple(values.shape)}; it must be {wanted}, and not empty")
    if not values.isfinite().all():
        raise FNSFTError(f"{what} hold NaN or infinite values, which say nothing; {_AGAIN}")
