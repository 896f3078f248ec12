"""The candidates of a search: each is a number of components, a covariance family and a start.

N rows, D columns, K components.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, check_cv
from sklearn.utils import check_random_state

from mixtura.core.errors import MixturaError
from mixtura.density import _init
from mixtura.density._checks import check_rows
from mixtura.density.errors import SingularComponentError
from mixtura.density.families import Family
from mixtura.density.gaussian_mixture import GaussianMixture

Floats = NDArray[np.floating]


class Candidate(NamedTuple):
    """One model that was tried.

    Attributes:
        n_components: K.
        covariance: its family.
        init: where EM started.
        score: the criterion, lower is better; inf if the model could not be fitted.
        log_likelihood: of all rows, weighted; nan if the model could not be fitted.
        n_parameters: free parameters.
        converged: whether EM ended by its tolerance.
        error: why the model could not be fitted, "" if it could.
    """

    n_components: int
    covariance: str
    init: str
    score: float
    log_likelihood: float
    n_parameters: int
    converged: bool
    error: str


class Table(NamedTuple):
    """What is fitted, and how it is judged."""

    data_ND: Floats
    labels: Any
    weights: Any
    criterion: str
    cv: Any
    seed: int

    def folds(self) -> Iterator[tuple[Table, Table]]:
        """Rows to fit to, and rows held out."""
        whole = isinstance(self.cv, int)
        splitter = KFold(self.cv, shuffle=True, random_state=self.seed) if whole else check_cv(self.cv)
        for parts in splitter.split(self.data_ND):
            fitted, held_out = (self._pick(part) for part in parts)
            yield fitted, held_out

    def _pick(self, index: NDArray[np.intp]) -> Table:
        given = (self.data_ND, self.labels, self.weights)
        parts = (None if values is None else np.asarray(values)[index] for values in given)
        return Table(*parts, self.criterion, self.cv, self.seed)


def distinct_families(families: Iterable[Family], K: int, D: int) -> list[Family]:
    """Families that are different models for K components of D columns; the first of each kind."""
    kinds: dict[tuple[str, ...], Family] = {}
    for family in families:
        letters = ["I" if letter == "I" else ("E" if K == 1 else letter) for letter in family]
        if D == 1:
            letters = letters[:1]
        kinds.setdefault(tuple(letters), family)
    return list(kinds.values())


def try_size(
    table: Table, base: GaussianMixture, K: int, families: list[Family], init: str
) -> list[tuple[Candidate, GaussianMixture | None]]:
    """Fits of one size from one start."""
    mixture = clone(base).set_params(n_components=K, random_state=table.seed)
    try:
        start = _start(table, mixture, init)
    except MixturaError as error:
        return [(_failed(K, family, init, table, error), None) for family in families]
    return [_try_one(table, mixture, family, init, start) for family in families]


def _start(table: Table, mixture: GaussianMixture, init: str) -> NDArray[Any]:
    """Where every family starts; rows of weight 0 are not looked at."""
    rows = check_rows(clone(mixture), table.data_ND, table.weights, labels=table.labels, K=mixture.n_components)
    given = _init.start(init, rows, mixture.n_components, check_random_state(table.seed))
    if rows.kept_N is None:
        return given
    whole = np.zeros((len(rows.kept_N), *given.shape[1:]), given.dtype)
    whole[~rows.kept_N] = 1 if given.ndim == 2 else 0
    whole[rows.kept_N] = given
    return whole


def _try_one(
    table: Table, mixture: GaussianMixture, family: Family, init: str, start: NDArray[Any]
) -> tuple[Candidate, GaussianMixture | None]:
    mixture = clone(mixture).set_params(covariance=family.name, init=start)
    try:
        fitted = _quietly(mixture, table)
        _refuse_collapsed(fitted, table)
        score = _cross_validate(mixture, table, init) if table.criterion == "cv" else _criterion(fitted, table)
    except MixturaError as error:
        return _failed(mixture.n_components, family, init, table, error), None
    fitted.set_params(init=init)
    total = fitted._total_log_likelihood(table.data_ND, table.weights)[0]
    candidate = Candidate(
        fitted.n_components, family.name, init, score, total, fitted.n_parameters_, bool(fitted.converged_), ""
    )
    return candidate, fitted


def _refuse_collapsed(fitted: GaussianMixture, table: Table) -> None:
    """Raise ``SingularComponentError`` if a component is as narrow as the rounding of the data; BIC would love it."""
    scale_D = np.nanstd(table.data_ND, axis=0, dtype=float)
    scale_D[scale_D == 0] = 1.0
    least_K = np.linalg.eigvalsh(fitted.covariances_ / np.outer(scale_D, scale_D))[:, 0]
    if least_K.min() < np.finfo(table.data_ND.dtype).eps:
        raise SingularComponentError(f"component {int(least_K.argmin())} has collapsed to the rounding of the data")


def _criterion(fitted: GaussianMixture, table: Table) -> float:
    return float(getattr(fitted, table.criterion)(table.data_ND, table.weights))


def _cross_validate(mixture: GaussianMixture, table: Table, init: str) -> float:
    total = 0.0
    for train, test in table.folds():
        start = _start(train, mixture, init)
        fitted = _quietly(clone(mixture).set_params(init=start), train)
        total -= 2 * fitted._total_log_likelihood(test.data_ND, test.weights)[0]
    return total


def _quietly(mixture: GaussianMixture, table: Table) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said of the best one
        return mixture.fit(table.data_ND, labels=table.labels, sample_weight=table.weights)


def _failed(K: int, family: Family, init: str, table: Table, error: MixturaError) -> Candidate:
    n_parameters = K - 1 + K * table.data_ND.shape[1] + family.n_parameters(K, table.data_ND.shape[1])
    return Candidate(K, family.name, init, float("inf"), float("nan"), n_parameters, False, str(error))
