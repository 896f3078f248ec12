"""One figure of all routers at equal budget: quality against the operations of a token, as SVG text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

from mixtura.evidence.results import Result

FIGURE = "bits per byte"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, ROW = 860, 420, 64, 340, 16, 48, 17


class Point(NamedTuple):
    """One arm: its operations a token, quality with interval, and name."""

    flops: float
    mean: float
    low: float
    high: float
    name: str
    is_baseline: bool


def points(results: Iterable[Result]) -> list[Point]:
    """Arms of the language rig that were tuned and trained on its whole budget, each once, the best first."""
    found: dict[str, Point] = {}
    users: dict[str, int] = {}
    for result in results:
        for arm in result.arms:
            if _is_comparable(arm):
                what = json.dumps(arm["config"], sort_keys=True)
                users[what] = users.get(what, 0) + 1
                found.setdefault(what, _point(result.key, arm))
    told = [
        point if users[what] == 1 else point._replace(is_baseline=True, name=point.name.partition(": ")[2])
        for what, point in found.items()
    ]
    return sorted(told, key=lambda point: point.mean)


def _is_comparable(arm: Mapping[str, Any]) -> bool:
    return FIGURE in arm["figures"] and "layer" in arm["config"] and "flops" in arm["cost"] and bool(arm["tuned"])


def _point(key: str, arm: Mapping[str, Any]) -> Point:
    told = arm["figures"][FIGURE]
    return Point(arm["cost"]["flops"], told["mean"], told["low"], told["high"], f"{key}: {arm['name']}", False)


def quality_by_operations(results: Iterable[Result]) -> str:
    """The figure; empty without points. A line leads from every point to its name, the best at the bottom."""
    told = points(results)
    if not told:
        return ""
    base = max(HEIGHT, TOP + ROW * len(told)) - BOTTOM
    x, y = _scale([p.flops for p in told], LEFT, WIDTH - RIGHT), _scale([p.mean for p in told], base, TOP)
    parts = [_axes(told, x, y, base)]
    for number, point in enumerate(told):
        parts.append(_mark(point, x(point.flops), y, base, base - 6 - ROW * number))
    title = "Held-out bits per byte against operations a token of all routers at equal budget"
    return (
        f'<svg viewBox="0 0 {WIDTH} {base + BOTTOM}" role="img" xmlns="http://www.w3.org/2000/svg" font-size="12" '
        f'fill="currentColor" stroke="none"><title>{title}</title>{"".join(parts)}</svg>'
    )


def _scale(values: list[float], start: float, end: float) -> Any:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or 1.0
    low, high = low - room, high + room
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _mark(point: Point, x: float, y: Any, base: int, row: float) -> str:
    shape = 'fill="none" stroke="currentColor"' if point.is_baseline else 'fill="#3f6fb5"'
    low, high = (max(TOP, min(base, y(bound))) for bound in (point.low, point.high))
    middle, names = y(point.mean), WIDTH - RIGHT + 14
    return (
        f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="currentColor" opacity="0.3"/>'
        f'<path d="M{x + 5:.1f} {middle:.1f}L{names - 4} {row - 4:.1f}" stroke="currentColor" opacity="0.15"/>'
        f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4" {shape}/>'
        f'<text x="{names}" y="{row:.1f}">{escape(point.name)}</text>'
    )


def _axes(told: list[Point], x: Any, y: Any, base: int) -> str:
    right = WIDTH - RIGHT
    lines = f'<path d="M{LEFT} {TOP}V{base}H{right}" fill="none" stroke="currentColor" opacity="0.5"/>'
    ticks = []
    for share in (0.0, 0.5, 1.0):
        flops = min(p.flops for p in told) * (1 - share) + max(p.flops for p in told) * share
        bits = min(p.mean for p in told) * (1 - share) + max(p.mean for p in told) * share
        ticks.append(f'<text x="{x(flops):.1f}" y="{base + 16}" text-anchor="middle">{flops / 1e3:.0f}</text>')
        ticks.append(f'<text x="{LEFT - 6}" y="{y(bits) + 4:.1f}" text-anchor="end">{bits:.2f}</text>')
    names = (
        f'<text x="{(LEFT + right) / 2}" y="{base + 36}" text-anchor="middle">thousand operations a token</text>'
        f'<text x="14" y="{(TOP + base) / 2}" transform="rotate(-90 14 {(TOP + base) / 2})" text-anchor="middle">'
        f"{FIGURE}</text>"
    )
    return lines + "".join(ticks) + names
