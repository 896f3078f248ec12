"""Plots of fitted mixtures, into axes of matplotlib that are given or made; matplotlib is imported only then.

N rows, D columns, K components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError
from mixtura.density._pictures import column_names, curves, find_column, order_of_rows, outlines, reach
from mixtura.density._tables import check_table

Column = int | str


def plot_components(mixture: Any, X: Any = None, *, columns: tuple[Column, Column] = (0, 1), ax: Any = None) -> Any:
    """Components in the plane of two columns: their means, and where one and two standard deviations end.

    Args:
        mixture: fitted.
        X: rows to draw too, colored by their most probable component.
        columns: of the plane, by index or name.
        ax: axes to draw into; None for new ones.

    Returns:
        The axes.
    """
    index = _indices(mixture, "columns", columns)
    ax = _axes(ax)
    means_K2, covariances_K22 = mixture.means_[:, index], mixture.covariances_[:, index][:, :, index]
    colors = _colors(len(means_K2))
    if X is not None:
        data_ND, found_N = check_table(mixture, X, reset=False), mixture.predict(X)
        shades = [*colors, "0.6"]  # the last is noise, -1
        ax.scatter(*data_ND[:, index].T, s=6, alpha=0.5, linewidths=0, c=[shades[k] for k in found_N])
    for radius in (1, 2):
        for color, line in zip(colors, outlines(means_K2, covariances_K22, radius), strict=True):
            ax.plot(*line.T, color=color, linewidth=1.5 / radius)
    ax.scatter(*means_K2.T, marker="x", color="black", zorder=3)
    names = column_names(mixture, mixture.means_.shape[1])
    ax.set(xlabel=names[index[0]], ylabel=names[index[1]])
    return ax


def plot_responsibilities(mixture: Any, X: Any, *, ax: Any = None) -> Any:
    """Responsibilities of all rows, stacked; rows lie side by side, by component and the surest first."""
    ax = _axes(ax)
    shares_NK = mixture.predict_proba(X)
    shares_NK = shares_NK[order_of_rows(shares_NK)]
    colors = [*_colors(len(mixture.weights_)), "0.6"][: shares_NK.shape[1]]
    ax.stackplot(np.arange(len(shares_NK)), shares_NK.T, colors=colors, linewidth=0, step="mid")
    ax.set(xlabel="row", ylabel="responsibility", xlim=(0, max(1, len(shares_NK) - 1)), ylim=(0, 1))
    return ax


def plot_criteria(search: Any, *, ax: Any = None) -> Any:
    """The criterion of a ``MixtureSearch`` by number of components, a line for each family; lower is better."""
    check_is_fitted(search)
    ax = _axes(ax)
    for curve in curves(search.candidates_):
        chosen = curve.covariance == search.best_.covariance
        ax.plot(curve.n_components, curve.scores, marker="o", linewidth=2.5 if chosen else 1, label=curve.covariance)
    ax.scatter(
        [search.best_.n_components], [search.best_.score], s=120, facecolors="none", edgecolors="black", zorder=3
    )
    ax.set(xlabel="components", ylabel=search.criterion)
    ax.legend(fontsize="small", ncols=2)
    return ax


def plot_conditional(mixture: Any, column: Column, given: Mapping[Column, Any], *, ax: Any = None) -> Any:
    """Density of one column once others are known, a line for each of their values, beside its density without.

    Args:
        mixture: fitted.
        column: whose density.
        given: column to value, or to several values, of which there are as many in every column.
        ax: axes to draw into; None for new ones.

    Raises:
        OptionError: if a column does not exist, is given twice, or numbers of values differ.
    """
    (target,) = _indices(mixture, "column", (column,))
    known = _indices(mixture, "given", tuple(given))
    if target in known:
        raise OptionError(f"column {column!r} is among those given")
    values = [np.atleast_1d(np.asarray(value, float)) for value in given.values()]
    if len({len(value) for value in values}) != 1:
        raise OptionError("given must have as many values in every column, and at least one column")
    ax = _axes(ax)
    plain = mixture.marginal([target])
    grid_P = reach(plain.means_[:, 0], plain.covariances_[:, 0, 0])
    names = column_names(mixture, mixture.means_.shape[1])
    ax.fill_between(grid_P, np.exp(plain.score_samples(grid_P[:, None])), color="0.85", label="nothing known")
    joint = mixture.marginal([*known, target])
    for row in np.stack(values, 1):
        batch = joint.conditional(np.repeat(row[None], len(grid_P), 0), list(range(len(known))))
        label = ", ".join(f"{names[d]} = {value:g}" for d, value in zip(known, row, strict=True))
        ax.plot(grid_P, np.exp(batch.score_samples(grid_P[:, None])), label=label)
    ax.set(xlabel=names[target], ylabel="density")
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib.pyplot import subplots
    except ImportError as error:
        raise OptionError("plots need matplotlib (pip install matplotlib), or an ax") from error
    return subplots()[1]


def _colors(K: int) -> list[str]:
    return [f"C{k % 10}" for k in range(K)]


def _indices(mixture: Any, name: str, columns: tuple[Column, ...]) -> list[int]:
    check_is_fitted(mixture)
    D = mixture.means_.shape[1]
    index = [find_column(mixture, column, D) for column in columns]
    if max(index, default=0) == D:
        known = ", ".join(column_names(mixture, D))
        raise OptionError(f"{name} must be of 0 .. {D - 1} or {known}, got {columns[index.index(D)]!r}")
    return index


__all__ = ["plot_components", "plot_conditional", "plot_criteria", "plot_responsibilities"]
