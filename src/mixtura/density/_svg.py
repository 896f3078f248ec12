"""Pictures of a report as SVG text. Every one has a title as its text alternative. P points of a line."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 78, 12, 12, 42
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8548f", "#b37b00", "#3d9fd3", "#8c6d31", "#7570b3", "#666666")
DARK = ("#4fb3ee", "#ff8a4a", "#33cfa0", "#e59cc6", "#f2b93b", "#8fd0f5", "#c9a866", "#a8a3e0", "#a0a0a0")
MARGIN = 0.04  # of a range, on either side


class Plot:
    """A plot of lines and points in the range that it is given.

    Args:
        x: lowest and highest value from left to right.
        y: lowest and highest value from below.
        title: what is shown.
        x_label: of the axis.
        y_label: of the axis.
        whole_x: whether only whole numbers are marked from left to right.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        title: str,
        x_label: str,
        y_label: str,
        *,
        whole_x: bool = False,
    ) -> None:
        self.x_range, self.y_range = _widen(x), _widen(y)
        self.whole_x = whole_x
        self.title, self.labels, self.parts = title, (x_label, y_label), list[str]()

    def points(self, xy_N2: Floats, colors: Sequence[str], radius: float = 1.8) -> None:
        """A dot at each row; rows without a color of their own take it in turn."""
        for (x, y), color in zip(self._place(xy_N2), colors, strict=True):
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" fill-opacity=".5"/>')

    def line(self, xy_P2: Floats, color: str, *, width: float = 1.6, opacity: float = 1, label: str = "") -> None:
        """A line through points, told by its label under the pointer."""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self._place(xy_P2))
        tip = f"<title>{escape(label)}</title>" if label else ""
        look = f'fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}"'
        self.parts.append(f'<path d="{path}" {look}>{tip}</path>')

    def bars(self, edges: Floats, heights: Floats) -> None:
        """Bars from 0 between edges."""
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            (x, y), (x2, y2) = self._place(np.array([[left, height], [right, self.y_range[0]]]))
            box = f'x="{x:.1f}" y="{y:.1f}" width="{max(x2 - x - 0.5, 0.5):.1f}" height="{max(y2 - y, 0):.1f}"'
            self.parts.append(f'<rect {box} fill="currentColor" fill-opacity=".16"/>')

    def text(self, xy: tuple[float, float], words: str) -> None:
        """Words at a point, on a halo of the background."""
        ((x, y),) = self._place(np.array([xy]))
        self.parts.append(f'<text class="mark" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(words)}</text>')

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
            if self.whole_x and value != round(value):
                continue
            ((x, _),) = self._place(np.array([[value, y0]]))
            parts.append(f'<text class="tick" x="{x:.1f}" y="{below + 14}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y_range):
            ((_, y),) = self._place(np.array([[x0, value]]))
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        x_label, y_label = (escape(_short(label)) for label in self.labels)
        middle = (TOP + below) / 2
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
        turned = f'transform="rotate(-90 12 {middle})" text-anchor="middle"'
        return [*parts, f'<text x="12" y="{middle}" {turned}>{y_label}</text>']


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most about six."""
    raw = (high - low) / most
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return [float(f"{value:.12g}") + 0.0 for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def color(k: int) -> str:
    """Color of component k, as the page defines it for light and dark; -1, the noise, is gray."""
    return f"var(--color{len(LIGHT) - 1 if k < 0 else k % (len(LIGHT) - 1)})"


def color_style() -> str:
    """What a page must say for the colors to exist."""
    light, dark = (";".join(f"--color{i}:{one}" for i, one in enumerate(colors)) for colors in (LIGHT, DARK))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _short(words: str, most: int = 34) -> str:
    """Words that fit beside an axis."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _widen(pair: tuple[float, float]) -> tuple[float, float]:
    """The range with a margin, but for an end at 0 of what is not negative."""
    low, high = map(float, pair)
    if not high > low:
        return low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1)
    margin = MARGIN * (high - low)
    return (low if low == 0 else low - margin), high + margin
