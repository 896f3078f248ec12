"""Numbers that pictures are made of, whoever draws them. N rows, D columns, K components, P points of a line."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Curve(NamedTuple):
    """The best score of each number of components, for one covariance family."""

    covariance: str
    n_components: list[int]
    scores: list[float]


def outlines(means_K2: Floats, covariances_K22: Floats, radius: float, points: int = 72) -> Floats:
    """Closed lines (K, P, 2) around each component, ``radius`` standard deviations from its mean."""
    angle_P = np.linspace(0, 2 * np.pi, points)
    circle_P2 = np.stack([np.cos(angle_P), np.sin(angle_P)], 1)
    values_K2, turns_K22 = np.linalg.eigh(covariances_K22)
    roots_K22 = turns_K22 * np.sqrt(np.maximum(values_K2, 0))[:, None]
    return means_K2[:, None] + radius * circle_P2 @ roots_K22.swapaxes(1, 2)


def reach(means_K: Floats, variances_K: Floats, deviations: float = 4.0, points: int = 300) -> Floats:
    """A grid of one column, (P,), that covers all components."""
    spread_K = deviations * np.sqrt(variances_K)
    return np.linspace((means_K - spread_K).min(), (means_K + spread_K).max(), points)


def curves(candidates: list[Any]) -> list[Curve]:
    """Of each family the best score by number of components; what could not be fitted is left out."""
    best: dict[str, dict[int, float]] = {}
    for one in candidates:
        if np.isfinite(one.score):
            sizes = best.setdefault(one.covariance, {})
            sizes[one.n_components] = min(one.score, sizes.get(one.n_components, np.inf))
    return [Curve(name, sorted(sizes), [sizes[K] for K in sorted(sizes)]) for name, sizes in best.items()]


def order_of_rows(shares_NK: Floats) -> NDArray[np.intp]:
    """Rows by their component, and within it the surest first."""
    return np.lexsort((-shares_NK.max(1), shares_NK.argmax(1)))


def column_names(mixture: Any, D: int) -> list[str]:
    """Names of the columns that the mixture was fitted to, or "column 0" and so on."""
    return [str(name) for name in getattr(mixture, "feature_names_in_", [f"column {d}" for d in range(D)])]


def find_column(mixture: Any, column: int | str, D: int) -> int:
    """Index of a column that is given by index or by name; D where there is none."""
    if isinstance(column, str):
        names = column_names(mixture, D)
        return names.index(column) if column in names else D
    return column if 0 <= column < D else D
