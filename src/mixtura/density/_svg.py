"""Pictures of a report as SVG text. Every one has a title as its text alternative. P points of a line."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 300, 58, 12, 12, 42
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7570b3", "#666666")


class Plot:
    """A plot of lines and points in the range that it is given.

    Args:
        x: lowest and highest value from left to right.
        y: lowest and highest value from below.
        title: what is shown.
        x_label: of the axis.
        y_label: of the axis.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], title: str, x_label: str, y_label: str) -> None:
        self.x_range, self.y_range = _widen(x), _widen(y)
        self.title, self.labels, self.parts = title, (x_label, y_label), list[str]()

    def points(self, xy_N2: Floats, colors: Sequence[str], radius: float = 1.8) -> None:
        """A dot at each row; rows without a color of their own take it in turn."""
        for (x, y), color in zip(self._place(xy_N2), colors, strict=True):
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" fill-opacity=".5"/>')

    def line(self, xy_P2: Floats, color: str, *, width: float = 1.6, label: str = "") -> None:
        """A line through points, told by its label under the pointer."""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self._place(xy_P2))
        tip = f"<title>{escape(label)}</title>" if label else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}">{tip}</path>')

    def bars(self, edges: Floats, heights: Floats, color: str = "#bbbbbb") -> None:
        """Bars from 0 between edges."""
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            (x, y), (x2, y2) = self._place(np.array([[left, height], [right, self.y_range[0]]]))
            box = f'x="{x:.1f}" y="{y:.1f}" width="{max(x2 - x - 0.5, 0.5):.1f}" height="{max(y2 - y, 0):.1f}"'
            self.parts.append(f'<rect {box} fill="{color}" fill-opacity=".6"/>')

    def text(self, xy: tuple[float, float], words: str, color: str = "currentColor") -> None:
        """Words beside a point."""
        ((x, y),) = self._place(np.array([xy]))
        self.parts.append(f'<text x="{x + 4:.1f}" y="{y - 4:.1f}" fill="{color}">{escape(words)}</text>')

    def svg(self) -> str:
        """The picture."""
        head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
        return f"{head}{''.join(self._frame())}{''.join(self.parts)}</svg>"

    def _place(self, xy_P2: Floats) -> Floats:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        x_P = LEFT + (xy_P2[:, 0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        y_P = HEIGHT - BOTTOM - (xy_P2[:, 1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return np.stack([x_P, y_P], 1)

    def _frame(self) -> list[str]:
        (x0, _), (y0, _) = self.x_range, self.y_range
        right, below = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<path class="axis" d="M{LEFT} {TOP}V{below}H{right}"/>']
        for value in ticks(*self.x_range):
            ((x, _),) = self._place(np.array([[value, y0]]))
            parts.append(f'<text class="tick" x="{x:.1f}" y="{below + 14}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y_range):
            ((_, y),) = self._place(np.array([[x0, value]]))
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        x_label, y_label = map(escape, self.labels)
        middle = (TOP + below) / 2
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
        turned = f'transform="rotate(-90 12 {middle})" text-anchor="middle"'
        return [*parts, f'<text x="12" y="{middle}" {turned}>{y_label}</text>']


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most about six."""
    raw = (high - low) / most
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return [float(f"{value:.12g}") for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def color(k: int) -> str:
    """Color of component k; -1, the noise, is gray."""
    return COLORS[-1] if k < 0 else COLORS[k % (len(COLORS) - 1)]


def _widen(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, pair)
    return (low, high) if high > low else (low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1))
