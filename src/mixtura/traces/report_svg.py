"""Charts as SVG text: heat map, bars, lines. Pure functions; every one has a title, axis labels and a text alternative.

R rows, C columns. Colors of heat maps are fixed (viridis, safe for color-blind eyes, text chosen by contrast); those of
bars and lines are the style sheet's and follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 44


def heat_map(
    values_RC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    top: float | None = None,
) -> str:
    """Colored table of numbers from 0 up; NaN is no cell, 0 is crossed out. Numbers are printed up to 16 columns.

    Args:
        values_RC: numbers, (R, C).
        rows: R labels.
        columns: C labels.
        title: what is shown, also the text alternative.
        x: what the columns are.
        y: what the rows are.
        top: value of the brightest color; the largest value if None.
    """
    top = float(top or np.nanmax(values_RC, initial=0)) or 1.0
    cell, line = (36, 26) if len(columns) <= 16 else (15, 20)
    left, head = 30 + 7 * max(map(len, rows), default=0), 34
    cells = [
        _cell(values_RC[r, c], top, left + c * cell, head + r * line, cell, line, f"{y} {rows[r]}, {x} {columns[c]}")
        for r in range(len(rows))
        for c in range(len(columns))
        if not math.isnan(values_RC[r, c])
    ]
    step = 1 if cell >= 7 * max(map(len, columns), default=1) + 4 else math.ceil(len(columns) / 16)
    labels = [_text(left + (c + 0.5) * cell, head - 5, columns[c], "middle") for c in range(0, len(columns), step)]
    labels += [_text(left - 6, head + (r + 0.5) * line + 4, row, "end") for r, row in enumerate(rows)]
    labels += [_text(left + len(columns) * cell / 2, 12, x, "middle", "axis"), _upright(head + len(rows) * line / 2, y)]
    below = head + len(rows) * line + 12
    width = left + max(len(columns) * cell, 190) + 6
    return _svg(width, below + 26, title, [*cells, *labels, *_scale(left, below, top)], fixed=True)


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    x: str,
    y: str,
    marks: Mapping[str, float] | None = None,
    top: float | None = None,
) -> str:
    """One bar for each label; ``marks`` sets a stroke at a value to compare with."""
    highest = max([*values.values(), *(marks or {}).values(), top or 0, 1e-9])
    ticks = _ticks(0, highest)
    scale = _Scale(0, len(values), 0, max(ticks[-1], highest))
    parts = _frame(scale, [], ticks, x, y)
    step = math.ceil(len(values) / 16)
    for i, (label, value) in enumerate(values.items()):
        left, right, at = scale.x(i + 0.15), scale.x(i + 0.85), scale.y(value)
        box = f'<rect class="bar" x="{left:.1f}" y="{at:.1f}" width="{right - left:.1f}"'
        parts.append(f'{box} height="{scale.y(0) - at:.1f}">{_tip(f"{x} {label}: {value:.4g}")}</rect>')
        if marks and label in marks:
            height = scale.y(marks[label])
            parts.append(f'<path class="mark" d="M{left - 3:.1f} {height:.1f}H{right + 3:.1f}"/>')
        if i % step == 0:
            parts.append(_text((left + right) / 2, HEIGHT - BOTTOM + 16, label, "middle"))
    return _svg(WIDTH, HEIGHT, title, parts)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> str:
    """One line for each series of (x, y) with finite y; told apart by color and by dashes."""
    finite = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in series.items()}
    every = [point for points in finite.values() for point in points]
    x_ticks = _ticks(min(a for a, _ in every), max(a for a, _ in every))
    y_ticks = _ticks(min(b for _, b in every), max(b for _, b in every))
    ends = (min(a for a, _ in every), max(a for a, _ in every))
    scale = _Scale(ends[0], ends[1], min(b for _, b in every), max(b for _, b in every))
    parts = _frame(scale, x_ticks, y_ticks, x, y)
    for i, (name, points) in enumerate(finite.items()):
        path = "L".join(f"{scale.x(a):.1f} {scale.y(b):.1f}" for a, b in points[:: math.ceil(len(points) / 400) or 1])
        last = f" (last {points[-1][1]:.4g})" if points else ""
        parts.append(f'<path class="line s{i % 4}" d="M{path}">{_tip(name + last)}</path>' if points else "")
        at = TOP + 12 + 18 * i
        parts.append(f'<path class="line s{i % 4}" d="M{WIDTH - 196} {at - 4}h26"/>')
        parts.append(_text(WIDTH - 162, at, name + last, "start", "legend"))
    return _svg(WIDTH, HEIGHT, title, parts)


class _Scale:
    """From data to the drawing, with a little room on the top."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.width = left, (right - left) or 1.0
        self.low, self.height = low, (high - low) or 1.0

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / self.width * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / self.height * (HEIGHT - TOP - BOTTOM)


def _frame(scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x: str, y: str) -> list[str]:
    """Grid, ticks and axis labels."""
    parts = []
    for tick in y_ticks:
        if scale.low <= tick <= scale.low + scale.height * 1.001:
            parts.append(f'<path class="grid" d="M{LEFT} {scale.y(tick):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 6, scale.y(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        if scale.left <= tick <= scale.left + scale.width:
            parts.append(_text(scale.x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, "middle", "axis"))
    parts.append(_upright((TOP + HEIGHT - BOTTOM) / 2, y))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that span low .. high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def color(share: float) -> tuple[str, str]:
    """Background of viridis at 0 .. 1, and the text color, black or white, that has more contrast on it."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(at), len(VIRIDIS) - 2)
    one, two = (np.array([int(VIRIDIS[i][j : j + 2], 16) for j in (0, 2, 4)]) for i in (low, low + 1))
    rgb = (one + (two - one) * (at - low)).round().astype(int)
    return "#" + "".join(f"{channel:02x}" for channel in rgb), "#000" if luminance(rgb) > 0.179 else "#fff"


def luminance(rgb: Sequence[int] | np.ndarray) -> float:
    """Relative luminance of an sRGB color, 0 black .. 1 white (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _cell(value: float, top: float, left: float, above: float, width: int, height: int, where: str) -> str:
    back, ink = color(value / top)
    box = f'<rect x="{left}" y="{above}" width="{width - 1}" height="{height - 1}" rx="2" fill="{back}">'
    text = "×" if value == 0 else f"{value:.2f}" if width > 20 else ""
    middle = f'x="{left + (width - 1) / 2}" y="{above + height / 2 + 4}"'
    printed = f'<text {middle} text-anchor="middle" style="fill:{ink}">{text}</text>' if text else ""
    return f"{box}{_tip(f'{where}: {value:.3f}')}</rect>{printed}"


def _scale(left: float, above: float, top: float) -> list[str]:
    """Legend of a heat map."""
    box = f'y="{above}" width="8" height="10"'
    steps = [f'<rect x="{left + 26 + 8 * i}" {box} fill="{color(i / 11)[0]}"/>' for i in range(12)]
    return [*steps, _text(left + 20, above + 10, "0", "end"), _text(left + 128, above + 10, f"{top:.2f}", "start")]


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(middle: float, text: str) -> str:
    place = f'transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle"'
    return f'<text class="axis" {place}>{escape(text)}</text>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(width: float, height: float, title: str, parts: Sequence[str], *, fixed: bool = False) -> str:
    size = f' width="{width:.0f}" height="{height:.0f}"' if fixed else ""
    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" aria-label="{escape(title)}" {box}{size}>{"".join(parts)}</svg>'
