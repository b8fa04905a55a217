"""Charts as SVG, made here: they take the colour of the text around them, and need no other package. No torch."""

import math
from collections.abc import Mapping, Sequence
from html import escape


COLORS = ("#c0392b", "#3b6ea5", "#2e8b57", "#b8860b", "#7d3c98", "#8a8f98")
Point = tuple[float, float]  # (x, y)

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 46
_ROW = 22


def line_chart(
    series: Mapping[str, Sequence[Point]], *, x: str, y: str, is_logarithmic: bool = False, is_share: bool = False
) -> bytes:
    """Lines with marks, and a legend above them.

    Args:
        series: name -> points, ascending in x.
        x, y: labels of the axes.
        is_logarithmic: whether the axis of x is.
        is_share: whether x is a share, shown in percent.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = [_scaled(px, is_logarithmic) for px, _ in points], [py for _, py in points]
    left, right = _span(xs)
    low, high = _span([0.0, *ys])
    legend = _legend(list(series))
    top = _TOP + 18 * len(legend)
    height = top + _HEIGHT - _TOP

    def place(px: float, py: float) -> tuple[float, float]:
        across = (_scaled(px, is_logarithmic) - left) / (right - left)
        up = (py - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), height - _BOTTOM - up * (height - _BOTTOM - top)

    parts = [*legend, *_y_axis(low, high, lambda value: place(points[0][0], value)[1])]
    for value in _thinned(sorted({px for px, _ in points})):
        shown = f"{100 * value:g}%" if is_share else f"{value:g}"
        parts.append(_text(place(value, low)[0], height - _BOTTOM + 16, shown, anchor="middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, x, anchor="middle"))
    parts.append(_text(14, top + (height - top - _BOTTOM) / 2, y, anchor="middle", turned=True))
    for number, (name, line) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        placed = [place(*point) for point in line]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        for (px, py), (vx, vy) in zip(placed, line, strict=True):
            told = escape(f"{name}: {vy:.3g} at {vx:g}")
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"><title>{told}</title></circle>')
    return _svg(parts, _WIDTH, height)


def strip_chart(
    rows: Sequence[tuple[str, tuple[float, float, float], Mapping[str, Sequence[float]]]], *, x: str
) -> bytes:
    """One row for each thing that is compared: its value with its interval, and the values of its controls as marks.

    Args:
        rows: name, (value, low, high), and control -> values.
        x: label of the axis.
    """
    names = list(dict.fromkeys(name for _, _, controls in rows for name in controls))
    values = [value for _, own, controls in rows for value in (*own, *(v for each in controls.values() for v in each))]
    low, high = _span([0.0, *values])
    legend = _legend(["the network, with its interval", *names])
    top = _TOP + 18 * len(legend)
    height = top + _ROW * len(rows) + _BOTTOM

    def across(value: float) -> float:
        return _LEFT + 30 + (value - low) / (high - low) * (_WIDTH - _LEFT - 30 - _RIGHT)

    parts = [*legend]
    for value in _ticks(low, high):
        parts.append(f'<path d="M{across(value):.1f} {top}V{height - _BOTTOM}" stroke="currentColor" opacity=".15"/>')
        parts.append(_text(across(value), height - _BOTTOM + 16, f"{value:g}", anchor="middle"))
    parts.append(_text((_LEFT + _WIDTH) / 2, height - 8, x, anchor="middle"))
    for place, (label, (value, least, most), controls) in enumerate(rows):
        y = top + _ROW * place + _ROW / 2
        parts.append(_text(_LEFT + 22, y + 4, label, anchor="end"))
        for number, name in enumerate(names, 1):
            color = COLORS[number % len(COLORS)]
            for each in controls.get(name, ()):
                parts.append(
                    f'<path d="M{across(each):.1f} {y - 6:.1f}v12" stroke="{color}" stroke-width="1.6" opacity=".8">'
                    f"<title>{escape(f'{name}: {each:.3g}')}</title></path>"
                )
        parts.append(
            f'<path d="M{across(least):.1f} {y:.1f}H{across(most):.1f}" stroke="{COLORS[0]}" stroke-width="2"/>'
            f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="4" fill="{COLORS[0]}">'
            f"<title>{escape(f'{label}: {value:.3g} [{least:.3g}, {most:.3g}]')}</title></circle>"
        )
    return _svg(parts, _WIDTH, height)


def _svg(parts: Sequence[str], width: float, height: float) -> bytes:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'font-family="sans-serif" font-size="11" style="max-width:100%;height:auto" role="img">'
    )
    return "\n".join([head, *parts, "</svg>"]).encode()


def _text(x: float, y: float, text: str, *, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{turn}>{escape(text)}</text>'


def _legend(names: Sequence[str]) -> list[str]:
    """One line for each two names."""
    lines = []
    for start in range(0, len(names), 2):
        y, line = _TOP + 9 * start, []
        for side, name in enumerate(names[start : start + 2]):
            x = _LEFT + side * 250
            color = COLORS[(start + side) % len(COLORS)]
            line.append(f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{color}"/>')
            line.append(_text(x + 15, y + 1, name))
        lines.append("".join(line))
    return lines


def _y_axis(low: float, high: float, place) -> list[str]:
    parts = []
    for value in _ticks(low, high):
        y = place(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    return parts


def _scaled(value: float, is_logarithmic: bool) -> float:
    return math.log10(value) if is_logarithmic else value


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _thinned(values: Sequence[float]) -> Sequence[float]:
    return values[:: max(1, -(-len(values) // 9))]
