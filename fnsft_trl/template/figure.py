"""The figure of a template: its networks over the layers as SVG, made from its description alone."""

from .description import TemplateDescription


_CELL, _LEFT, _TOP = 18, 70, 34  # pixels: height of a row, and where the first one starts
_RELIABILITY = {True: "reliability above null", False: "reliability (null unknown)"}  # by whether the null is known
_NARROWEST = 280  # pixels, so that the headings of few layers stay apart


def networks_svg(description: TemplateDescription) -> str:
    """The networks over the layers as a picture: the share of each layer's neurons in each network, and reliability.

    Reliability is that above null; of a template that knows no null, the bare one, as hollow bars.

    Args:
        description: of the template.
    """
    widths, components = description.widths, description.components
    layers = sorted(widths)
    wide = max(_CELL, -(-_NARROWEST // len(layers)))  # of a layer's column
    width, height = len(layers) * wide, len(components) * _CELL
    bars = _LEFT + width + 24
    known = description.null is not None
    columns = {layer: _LEFT + number * wide for number, layer in enumerate(layers)}
    shares = [{layer: count / widths[layer] for layer, count in component.layers.items()} for component in components]
    most = max((value for share in shares for value in share.values()), default=0) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + width + 190}" height="{_TOP + height + 64}" '
        'font-family="sans-serif" font-size="11" fill="#1c2733">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" font-size="12">share of each layer\'s neurons in the network</text>',
        f'<text x="{bars}" y="18" font-size="12">{_RELIABILITY[known]}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" fill="#f4f6f8"/>',
    ]
    for number, (component, share) in enumerate(zip(components, shares, strict=True)):
        parts += _row(number, share, columns, wide=wide, most=most)
        if component.reliability is not None:
            y = _TOP + number * _CELL + 4
            value = description.reliability_above_null(number) if known else min(1, component.reliability)
            look = 'fill="#3b6ea5"' if known else 'fill="none" stroke="#3b6ea5"'
            parts.append(
                f'<rect x="{bars}" y="{y}" width="{round(100 * value)}" height="10" {look}>'
                f"<title>{_RELIABILITY[known]}: {value:.2f}</title></rect>"
            )
    parts.append(f'<path d="M{bars} {_TOP}v{height}" stroke="#1c2733"/>')
    for layer in layers[:: max(1, -(-len(layers) // 16))]:
        x = columns[layer] + wide // 2
        parts.append(f'<text x="{x}" y="{_TOP + height + 15}" text-anchor="middle">{layer}</text>')
    parts += [
        f'<text x="{_LEFT + width // 2}" y="{_TOP + height + 34}" text-anchor="middle">layer</text>',
        f'<text x="{_LEFT - 8}" y="18" font-size="12" text-anchor="end">network</text>',
        f'<text x="{_LEFT}" y="{_TOP + height + 54}">darkest: {most:.1%} of a layer</text>',
        *(
            f'<text x="{bars + 100 * value}" y="{_TOP + height + 15}" text-anchor="middle">{value}</text>'
            for value in (0, 1)
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _row(number: int, share: dict[int, float], columns: dict[int, int], *, wide: int, most: float) -> list[str]:
    """The cells of one network, darker where more of a layer is in it."""
    y = _TOP + number * _CELL
    parts = [f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{number}</text>']
    for layer, x in columns.items():
        if share.get(layer):
            opacity = f"{max(0.04, share[layer] / most):.2f}"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{wide}" height="{_CELL}" fill="#4b2e83" fill-opacity="{opacity}">'
                f"<title>network {number}, layer {layer}: {share[layer]:.1%}</title></rect>"
            )
    return parts
