"""The figure of a template, from its description."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from fnsft_trl.template.description import NullReliability, TemplateDescription
from fnsft_trl.template.figure import networks_svg


_SVG = "{http://www.w3.org/2000/svg}"


def drawing(description) -> ElementTree.Element:
    return ElementTree.fromstring(networks_svg(description))


@pytest.fixture
def description(templates):
    return TemplateDescription.of(templates["llama"], "0" * 64)  # 3 layers


def bars(svg):
    """Length of each bar, as a share of the scale, and whether it is filled."""
    zero, one = sorted(float(t.get("x")) for t in svg.iter(f"{_SVG}text") if t.text in ("0", "1"))[-2:]  # of the scale
    found = [rect for rect in svg.iter(f"{_SVG}rect") if float(rect.get("x") or 0) == zero]
    return [(float(bar.get("width")) / (one - zero), bar.get("fill") != "none") for bar in found]


def test_headings_stay_apart_where_a_model_has_few_layers(description):
    x = {text.text: float(text.get("x")) for text in drawing(description).iter(f"{_SVG}text")}
    assert x["reliability above null"] - x["share of each layer's neurons in the network"] > 300


def with_reliability(description, values, null):
    components = [replace(c, reliability=value) for c, value in zip(description.components, values, strict=True)]
    return replace(description, components=tuple(components), null=null)


@pytest.mark.parametrize(
    ("null", "expected"),
    [
        (NullReliability(0.2, 0.1, highest=0.5), [0.8, 0.0, 0.0]),
        (NullReliability(0.2, 0.1), [0.875, 0.375, 0.0]),  # as an older version measured it
        (NullReliability(0.9, 0.1, highest=1.0), [0.0, 0.0, 0.0]),
    ],
)
def test_bars_are_of_the_reliability_above_null(description, null, expected):
    shown = bars(drawing(with_reliability(description, [0.9, 0.5, 0.1], null)))
    assert [length for length, _ in shown] == pytest.approx(expected, abs=0.01)
    assert all(filled for _, filled in shown)


def test_where_the_null_is_unknown_bars_are_hollow_and_the_heading_says_so(description):
    svg = drawing(with_reliability(description, [0.9, 0.5, 0.1], None))
    assert bars(svg) == [(0.9, False), (0.5, False), (0.1, False)]
    assert "reliability (null unknown)" in [text.text for text in svg.iter(f"{_SVG}text")]
    assert bars(drawing(with_reliability(description, [None] * 3, None))) == []
