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


def test_headings_stay_apart_where_a_model_has_few_layers(description):
    x = {text.text: float(text.get("x")) for text in drawing(description).iter(f"{_SVG}text")}
    assert x["reliability"] - x["share of each layer's neurons in the network"] > 300


def test_the_reliability_that_chance_gives_is_a_line_across_the_bars(description):
    svg = drawing(replace(description, null=NullReliability(reliability=0.25, jaccard=0.1)))
    (line,) = svg.iter(f"{_SVG}path")
    zero, one = sorted(float(t.get("x")) for t in svg.iter(f"{_SVG}text") if t.text in ("0", "1"))[-2:]  # of the scale
    assert line.get("d").startswith(f"M{zero + 0.25 * (one - zero):g} ")
    assert not list(drawing(replace(description, null=None)).iter(f"{_SVG}path"))
