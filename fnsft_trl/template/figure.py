"""The figure of a template: its networks over the layers as SVG, made from its description alone."""

from .description import TemplateDescription


_NARROWEST = 280  # pixels, so that the headings of few layers stay apart


def networks_svg(description: TemplateDescription) -> str:
    """The networks over the layers as a picture: the share of each layer's neurons in each network, and reliability.

    Args:
        description: of the template.
    """
    widths, components = description.widths, description.components
    layers = sorted(widths)
    cell, left, top = 18, 70, 34
    wide = max(cell, -(-_NARROWEST // len(layers)))  # of a layer's column
    width, height = len(layers) * wide, len(components) * cell
    bars = left + width + 24
    shares = [{layer: count / widths[layer] for layer, count in component.layers.items()} for component in components]
    most = max((value for share in shares for value in share.values()), default=0) or 1
    step = max(1, -(-len(layers) // 16))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="{top + height + 64}" '
        'font-family="sans-serif" font-size="11" fill="#1c2733">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left}" y="18" font-size="12">share of each layer\'s neurons in the network</text>',
        f'<text x="{bars}" y="18" font-size="12">reliability</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#f4f6f8"/>',
    ]
    for number, (component, share) in enumerate(zip(components, shares, strict=True)):
        y = top + number * cell
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{number}</text>')
        for column, layer in enumerate(layers):
            if share.get(layer):
                opacity = f"{max(0.04, share[layer] / most):.2f}"
                parts.append(
                    f'<rect x="{left + column * wide}" y="{y}" width="{wide}" height="{cell}" fill="#4b2e83" '
                    f'fill-opacity="{opacity}"><title>network {number}, layer {layer}: {share[layer]:.1%}</title>'
                    "</rect>"
                )
        if component.reliability is not None:
            length = round(100 * min(1, component.reliability))
            parts.append(
                f'<rect x="{bars}" y="{y + 4}" width="{length}" height="10" fill="#3b6ea5">'
                f"<title>{component.reliability:.2f}</title></rect>"
            )
    if description.null is not None:
        x = bars + round(100 * description.null.reliability)
        parts += [
            f'<path d="M{x} {top}v{height}" stroke="#1c2733" stroke-dasharray="3 2"/>',
            f'<text x="{bars}" y="{top + height + 54}">dashed: by chance</text>',
        ]
    for column in range(0, len(layers), step):
        x = left + column * wide + wide // 2
        parts.append(f'<text x="{x}" y="{top + height + 15}" text-anchor="middle">{layers[column]}</text>')
    parts += [
        f'<text x="{left + width // 2}" y="{top + height + 34}" text-anchor="middle">layer</text>',
        f'<text x="{left - 8}" y="18" font-size="12" text-anchor="end">network</text>',
        f'<text x="{left}" y="{top + height + 54}">darkest: {most:.1%} of a layer</text>',
        *(
            f'<text x="{bars + 100 * value}" y="{top + height + 15}" text-anchor="middle">{value}</text>'
            for value in (0, 1)
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)
