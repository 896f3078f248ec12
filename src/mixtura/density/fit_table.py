"""``fit_table``: from a file's table to a mixture that a search has chosen, with what a reader must know of the way.

N rows, D columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.density._checks import check_whole_number
from mixtura.density.search import MixtureSearch
from mixtura.density.table import Table

Floats = NDArray[np.floating]
Index = NDArray[np.intp]
MOST_COMPONENTS = 9


class FittedTable(NamedTuple):
    """What was fitted.

    Attributes:
        search: fitted; its ``best_estimator_`` knows all rows.
        names: of the columns that were used.
        data_ND: their values.
        weights_N: of the rows, or None.
        components_N: component of each row, -1 for noise.
        probabilities_N: and how sure that is.
        rows_scored: rows that the criterion was computed on: all with a weight, or those drawn.
        notes: how the table was understood, what was left out, and why.
    """

    search: MixtureSearch
    names: list[str]
    data_ND: Floats
    weights_N: Floats | None
    components_N: NDArray[np.intp]
    probabilities_N: Floats
    rows_scored: int
    notes: list[str]


def fit_table(
    table: Table,
    *,
    columns: Sequence[str] = (),
    weight: str | None = None,
    n_components: Sequence[int] | None = None,
    covariance: str | Sequence[str] = "all",
    criterion: str = "bic",
    rows: int = 20_000,
    n_jobs: int | None = None,
    random_state: Any = 0,
) -> FittedTable:
    """Choose a mixture for a table and fit it to all rows.

    Columns that hold one value, or number the rows, are left out with a note unless they are named.

    Args:
        table: as ``read_table`` gives it.
        columns: to use; all if empty.
        weight: column of row weights, which is not fitted; a row of weight 2 counts as two rows.
        n_components: numbers of components to try; None for 1 to 9, of those that there are distinct rows for.
        covariance: as in ``MixtureSearch``.
        criterion: as in ``MixtureSearch``.
        rows: at most so many, drawn at random, are searched; the best model is then fitted to all.
        n_jobs: processes.
        random_state: seed.

    Raises:
        OptionError, UnknownNameError: naming the column or option.
    """
    check_whole_number("rows", rows, 2)
    weights_N = None if weight is None else _weights(table, weight)
    if columns:
        table = table.only(columns)
    elif weight is not None:
        table = table.without({weight: "holds the weights"})
    table = table.without({} if columns else _useless(table))
    if not table.names:
        reasons = "; ".join(f"{name!r} {reason}" for name, reason in table.left_out.items())
        raise OptionError(f"no column can be fitted: {reasons}")
    notes = list(table.notes)
    notes += [f"Column {name!r} was left out: it {reason}." for name, reason in table.left_out.items()]
    notes += _about_rows(table.data_ND)
    counted = np.arange(len(table.data_ND)) if weights_N is None else np.flatnonzero(weights_N)
    index = _drawn(counted, rows, random_state)
    search = MixtureSearch(
        _sizes(n_components, table.data_ND[index]),
        covariance=covariance,
        criterion=criterion,
        n_jobs=n_jobs,
        random_state=random_state,
    )
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, MixturaWarning):  # the report tells them
            warnings.simplefilter("ignore", category)
        notes += _search(search, table.data_ND, weights_N, counted, index)
    found_N, sure_N = search.predict(table.data_ND), search.predict_proba(table.data_ND).max(1)
    for one in (search, search.best_estimator_):
        one.feature_names_in_ = np.asarray(table.names, dtype=object)
    return FittedTable(search, table.names, table.data_ND, weights_N, found_N, sure_N, len(index), notes)


def _drawn(counted: Index, rows: int, seed: Any) -> Index:
    """Rows to search, of those that count."""
    if len(counted) <= rows:
        return counted
    return np.sort(np.random.default_rng(seed).choice(counted, rows, replace=False))


def _sizes(n_components: Sequence[int] | None, searched_ND: Floats) -> Sequence[int]:
    distinct = len(np.unique(searched_ND, axis=0))
    if n_components is None:
        return range(1, min(MOST_COMPONENTS, distinct) + 1)
    if len(n_components) and max(n_components) > distinct:
        raise OptionError(
            f"n_components must be at most the number of distinct rows that are searched, {distinct:,}, got "
            f"{max(n_components):,}"
        )
    return n_components


def _search(
    search: MixtureSearch, data_ND: Floats, weights_N: Floats | None, counted: Index, index: Index
) -> list[str]:
    """Search some rows, fit to all that count, and say so."""
    weights = None if weights_N is None else weights_N[index]
    search.fit(data_ND if len(index) == len(data_ND) else data_ND[index], sample_weight=weights)
    notes = []
    if len(index) < len(counted):
        search.best_estimator_.set_params(warm_start=True).fit(data_ND, sample_weight=weights_N)
        search.best_estimator_.set_params(warm_start=False)
        which = f"all {len(counted):,}" + " with a weight" * (len(counted) < len(data_ND))
        notes += [f"The model was chosen on {len(index):,} rows drawn at random, then fitted to {which}."]
    if weights is not None and weights.sum() < search.best_.n_parameters:
        notes += [
            f"Weights count rows, and they sum to {weights.sum():.3g}, less than the {search.best_.n_parameters} "
            "parameters of the model: the criterion cannot tell models apart on so few rows."
        ]
    return notes


def _about_rows(data_ND: Floats) -> list[str]:
    empty = int(np.isnan(data_ND).all(1).sum())
    rows = "1 row holds" if empty == 1 else f"{empty:,} rows hold"
    return [f"{rows} no value: there the components are as probable as their weights say."] if empty else []


def _weights(table: Table, name: str) -> Floats:
    weights_N = np.asarray(table.data_ND[:, table.column(name)], dtype=float)
    if not (np.isfinite(weights_N).all() and (weights_N >= 0).all() and weights_N.any()):
        raise OptionError(f"weights in column {name!r} must not be missing, negative, or all 0")
    return weights_N


def _useless(table: Table) -> dict[str, str]:
    """Columns that say nothing of the rows."""
    found = {}
    for name, values_N in zip(table.names, table.data_ND.T, strict=True):
        known = values_N[~np.isnan(values_N)]
        if not len(known):
            found[name] = "holds no value"
        elif (known == known[0]).all():
            found[name] = f"holds {known[0]:g} in every row"
        elif len(known) == len(values_N) > 2 and (np.diff(values_N) == 1).all():
            found[name] = "numbers the rows"
    return found
