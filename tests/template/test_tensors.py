"""Each tensor of a template is what its files may hold, or the template is none: every part, every kind of damage."""

from dataclasses import fields, replace

import pytest
import torch

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate
from fnsft_trl.template.description import SIDES


PARTS = ("loadings", "mean", "rms", *SIDES)
DAMAGE = {
    "NaN": (lambda values: values.view(-1)[3:4].fill_(torch.nan) is None or values, "hold NaN"),
    "infinite": (lambda values: values.view(-1)[3:4].fill_(-torch.inf) is None or values, "hold NaN or infinite"),
    "half": (lambda values: values.bfloat16(), r"are torch\.bfloat16; give float32"),
    "whole numbers": (lambda values: values.long(), r"are torch\.int64; give float32"),
    "dimension": (lambda values: values[None], "have the shape"),
    "empty": (lambda values: values[..., :0], "have the shape"),
    "width": (lambda values: values[..., :-1], "have the shape|not orthonormal"),
    "rows": (lambda values: torch.cat([values, values]), "have the shape|not orthonormal"),
}


@pytest.fixture(scope="module")
def template(templates):
    """Of three layers, with directions."""
    found = templates["llama"]
    basis = {layer: {side: torch.eye(width)[:3] for side in SIDES} for layer, width in found.widths.items()}
    return replace(found, basis=basis)


def changed(template, part, layer, values):
    """The same with another tensor; with `None`, without it."""
    held = getattr(template, "basis" if part in SIDES else part)
    if part in SIDES:
        sides = held[layer] | {part: values} if values is not None else {SIDES[0]: held[layer][SIDES[0]]}
        return replace(template, basis=held | {layer: sides})
    left = {number: tensor for number, tensor in held.items() if number != layer}
    return replace(template, **{part: left if values is None else left | {layer: values}})


def of(template, part, layer):
    return (template.basis[layer][part] if part in SIDES else getattr(template, part)[layer]).clone()


def test_these_are_all_parts_that_hold_tensors(template):
    def tensors(value):
        if isinstance(value, dict):
            return any(map(tensors, value.values()))
        return isinstance(value, torch.Tensor)

    holding = {field.name for field in fields(FunctionalNetworkTemplate) if tensors(getattr(template, field.name))}
    assert holding == {"basis" if part in SIDES else part for part in PARTS}


@pytest.mark.parametrize(
    ("part", "kind"), [(part, kind) for part in PARTS for kind in DAMAGE if (part, kind) != ("input_basis", "width")]
)
def test_a_tensor_that_no_file_may_hold_makes_no_template(part, kind, template):
    damage, message = DAMAGE[kind]
    with pytest.raises(FNSFTError, match=message) as error:
        changed(template, part, 1, damage(of(template, part, 1)))
    assert "layer 1" in str(error.value)
    assert part in str(error.value) or (part, kind) == ("loadings", "width")  # then the others do not fit


@pytest.mark.parametrize("part", PARTS)
def test_all_layers_have_all_parts(part, template):
    with pytest.raises(FNSFTError, match=r"layers|must have"):
        changed(template, part, 1, None)


def test_values_that_nothing_has_are_refused(template):
    for part in SIDES:
        for rows in (2 * of(template, part, 1), of(template, part, 1)[[0, 0]], of(template, part, 1) + 0.01):
            with pytest.raises(FNSFTError, match="not orthonormal"):
                changed(template, part, 1, rows)
    mean, rms = template.mean[1], template.rms[1]
    for part, values in (("rms", -rms), ("rms", mean.abs() / 2), ("mean", rms * 2)):
        with pytest.raises(FNSFTError, match="the rms of layer 1 cannot be"):
            changed(template, part, 1, values)
    with pytest.raises(FNSFTError, match="give both"):
        replace(template, rms={})


@pytest.mark.parametrize("part", PARTS)
def test_float64_is_kept(part, template, tmp_path):
    changed(template, part, 1, of(template, part, 1).double()).save_pretrained(tmp_path)
    assert of(FunctionalNetworkTemplate.from_pretrained(tmp_path), part, 1).dtype == torch.float64
