"""Plots of results as SVG: lines in panels, and bars in groups. Written by ``tables.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLORS = {
    "mixtura": "#00796b",
    "transformers": "#8d8d8d",
    "transformers eager": "#8d8d8d",
    "transformers grouped_mm": "#bdbdbd",
    "transformers, dense twin": "#d7ccc8",
    "zentorch": "#e65100",
    "vllm vec": "#90caf9",
    "vllm sgl": "#1565c0",
    "transformers + sgl": "#1565c0",
    "onnxruntime": "#7b1fa2",
    "llama.cpp": "#c2185b",
}
_STYLE = "font-family:system-ui,sans-serif;font-size:12px;fill:#212121"
_GRID, _AXIS = "#e0e0e0", "#616161"


def lines(
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, bool]]]],
    ticks: Sequence[str],
    axis: str,
) -> str:
    """Panels side by side, on a common vertical axis of powers of two.

    Args:
        title: says what is drawn and which way is better.
        panels: by title, for each name the height and whether it was measured undisturbed, at each tick; NaN for none.
        ticks: names of places from left to right.
        axis: what the ticks are.
    """
    heights = [y for panel in panels.values() for points in panel.values() for y, _ in points if y == y]
    low, high = math.floor(math.log2(min(heights))), math.ceil(math.log2(max(heights)))
    width, height, left, top, gap = 230, 230, 48, 56, 24
    names = sorted({name for panel in panels.values() for name in panel}, key=list(COLORS).index)
    total = left + len(panels) * (width + gap)
    parts = [_text(left, 20, title, bold=True), *_legend(names, left, 38)]
    y_of = lambda y: top + 18 + (height - 18) * (high - math.log2(y)) / (high - low)
    for n, (name, panel) in enumerate(panels.items()):
        x0 = left + n * (width + gap)
        x_of = lambda i, x0=x0: x0 + width * (i + 0.5) / len(ticks)
        parts.append(_text(x0 + width / 2, top + 8, name, anchor="middle"))
        for power in range(low, high + 1):
            y = y_of(2.0**power)
            parts.append(_line(x0, y, x0 + width, y, _AXIS if power == 0 else _GRID))
            if n == 0:
                parts.append(_text(x0 - 6, y + 4, f"{2.0**power:g}", anchor="end"))
        parts += [_text(x_of(i), top + height + 16, tick, anchor="middle") for i, tick in enumerate(ticks)]
        for who, points in panel.items():
            parts += _curve([(x_of(i), y_of(y), sure) for i, (y, sure) in enumerate(points) if y == y], COLORS[who])
    parts.append(_text(left, top + height + 34, axis))
    return _svg(total, top + height + 44, parts)


def bars(title: str, groups: Mapping[str, Mapping[str, tuple[float, str, bool]]], reach: float) -> str:
    """Bars from left to right in groups, each with a label.

    Args:
        title: says what is drawn and which way is better.
        groups: by title, for each name the length, the label and whether it was measured undisturbed.
        reach: the longest bar that is drawn; a dashed line stands at 1.
    """
    left, width, thick, top = 190, 460, 15, 56
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    parts, y = [_text(8, 20, title, bold=True), *_legend(names, 8, 38)], float(top)
    for name, group in groups.items():
        parts.append(_text(left - 8, y + thick * len(group) / 2 + 4, name, anchor="end"))
        for who, (value, label, sure) in group.items():
            length = width * min(value, reach) / reach
            fill = f'fill="{COLORS[who]}"' + ("" if sure else ' fill-opacity="0.4"')
            parts.append(f'<rect x="{left}" y="{y:.1f}" width="{length:.1f}" height="{thick - 2}" {fill}/>')
            parts.append(_text(left + length + 5, y + thick - 4, label))
            y += thick
        y += 10
    one = left + width / reach
    parts.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top - 6}" y2="{y - 6:.1f}" stroke="{_AXIS}" {_DASHED}/>')
    return _svg(left + width + 90, int(y) + 4, parts)


_DASHED = 'stroke-dasharray="4 3"'


def _legend(names: Sequence[str], x: float, y: float) -> list[str]:
    parts = []
    for name in names:
        parts.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{COLORS[name]}"/>')
        parts.append(_text(x + 14, y, name))
        x += 14 + 6.6 * len(name) + 14
    return parts


def _curve(points: Sequence[tuple[float, float, bool]], color: str) -> list[str]:
    """A line through points; hollow ones were disturbed."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" stroke="{color}" fill="{color if sure else "#fff"}"/>'
        for x, y, sure in points
    ]
    return [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>', *dots]


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{_STYLE}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"
