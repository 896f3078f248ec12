"""Rows of which something is hidden: values that are missing at random, values under noise of known covariance.

N rows, M rows of a chunk, D columns, K components, O observed columns. Rows with the same observed columns are treated
together. With T = S_oo + noise_oo,

    log score = constant + log N(x_o; m_o, T)           gain G = S_:o T^-1
    posterior mean of the row = m + G (x_o - m_o)        posterior covariance B = S - G S_o:

and the moments of a component are those of posterior means, plus B for each row: exact EM (Ghahramani and Jordan 1994
for missing values; Bovy, Hogg and Roweis, arXiv:0905.2979, eq. 5, for noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.density._parameters import LOG_2PI, Scores, cholesky_factors
from mixtura.density._rows import Rows
from mixtura.density._statistics import Statistics, empty_statistics

Floats = NDArray[np.floating]
Moments = tuple[Floats, Floats, Floats]


class Posterior(NamedTuple):
    """Of some rows under each component: log scores (K, M), means less m (K, M, D), covariances (K, M or 1, D, D)."""

    log_KM: Floats
    shifts_KMD: Floats
    covariances: Floats


class Hidden:
    """Scores and expected moments of rows with hidden parts; the interface of ``Products`` and ``Factors``."""

    common = 0.0

    def __init__(self, rows: Rows, scores: Scores) -> None:
        self.rows, self.diagonal = rows, scores.diagonal
        self.reference_KD = scores.means_KD
        self.K, self.D = scores.means_KD.shape
        self.covariances_KDD, log_roots_K = _covariances(scores)
        self.log_weights_K = scores.constants_K - log_roots_K + 0.5 * self.D * LOG_2PI

    def chunks(self) -> Iterator[tuple[NDArray[np.intp], Callable[[], Posterior]]]:
        """Indices of rows with the same columns observed, and what makes their posterior."""
        per_row = self.K * self.D * (1 if self.rows.noise is None else 3 * self.D)
        size = max(16, (1 << 20) // per_row)
        for observed_D, index in patterns(self.rows.data_ND):
            for start in range(0, len(index), size):
                part = index[start : start + size]
                yield part, partial(self.posterior, part, observed_D)

    def _noise(self, part: NDArray[np.intp]) -> Floats | None:
        noise = None if self.rows.noise is None else self.rows.noise[part]
        return noise if noise is None or noise.ndim == 3 else noise[:, :, None] * np.eye(self.D)

    def posterior(self, part: NDArray[np.intp], observed_D: NDArray[np.bool_]) -> Posterior:
        """The posterior of some rows, of which the same columns are observed."""
        x_MD, noise_MDD, o = self.rows.data_ND[part], self._noise(part), np.flatnonzero(observed_D)
        difference_KMO = x_MD[:, o].astype(np.float64) - self.reference_KD[:, None, o]
        total = self.covariances_KDD[:, None][..., o[:, None], o]
        if noise_MDD is not None:
            total = total + noise_MDD[:, o[:, None], o]
        flat = total.reshape(total.shape[0] * total.shape[1], len(o), len(o))
        factors = cholesky_factors(flat).reshape(total.shape)
        log_det = np.log(np.diagonal(factors, axis1=-2, axis2=-1)).sum(-1)
        side = self.covariances_KDD[:, None][..., o, :]
        gain = np.linalg.solve(total, np.broadcast_to(side, (*total.shape[:-1], self.D))).swapaxes(-1, -2)
        white_KMO = _apply(np.linalg.inv(factors), difference_KMO)
        log_KM = -0.5 * (white_KMO**2).sum(-1) - log_det - 0.5 * len(o) * LOG_2PI
        covariances = self.covariances_KDD[:, None] - gain @ side
        return Posterior(log_KM + self.log_weights_K[:, None], _apply(gain, difference_KMO), covariances)

    def log_scores(self, posterior: Posterior) -> Floats:
        """Log scores (K, M)."""
        return posterior.log_KM.copy()

    def moments(self, shares_KM: Floats, posterior: Posterior) -> Statistics:
        """Expected moments of the chunk about the means."""
        shifts_KMD, covariances = posterior.shifts_KMD, posterior.covariances
        weighted_KMD = shares_KM[:, :, None] * shifts_KMD
        second_KDD = weighted_KMD.swapaxes(1, 2) @ shifts_KMD
        spread_KM = shares_KM.sum(1, keepdims=True) if covariances.shape[1] == 1 else shares_KM
        second_KDD = second_KDD + np.einsum("km,kmij->kij", spread_KM, covariances)
        zero = empty_statistics(self.reference_KD, diagonal=self.diagonal)
        second = np.diagonal(second_KDD, axis1=1, axis2=2) if self.diagonal else second_KDD
        return zero + Statistics(shares_KM.sum(1), weighted_KMD.sum(1), second, self.reference_KD)

    def unpack(self, sums: Statistics) -> Moments:
        """Counts and moments about the means."""
        return sums.count_K, sums.first_KD, sums.second


def patterns(data_ND: Floats) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.intp]]]:
    """Each pattern of observed columns, with the rows that have it."""
    observed_ND = ~np.isnan(data_ND)
    kinds, which_N = np.unique(observed_ND, axis=0, return_inverse=True)
    which_N = which_N.ravel()
    order = np.argsort(which_N, kind="stable")
    bounds = np.searchsorted(which_N[order], np.arange(len(kinds) + 1))
    for kind, start, end in zip(kinds, bounds, bounds[1:], strict=False):
        yield kind, order[start:end]


def _covariances(scores: Scores) -> tuple[Floats, Floats]:
    """Covariances (K, D, D) from the roots of precisions, and the sums of the logs of the roots' diagonals."""
    if scores.diagonal:
        return (1 / scores.roots**2)[:, :, None] * np.eye(scores.roots.shape[1]), np.log(scores.roots).sum(1)
    factors = np.linalg.inv(scores.roots)
    return factors.swapaxes(1, 2) @ factors, np.log(np.diagonal(scores.roots, axis1=1, axis2=2)).sum(1)


def _apply(matrices: Floats, vectors_KMO: Floats) -> Floats:
    """Matrices (K, M or 1, P, O) times vectors (K, M, O)."""
    if matrices.shape[1] == 1:
        return vectors_KMO @ matrices[:, 0].swapaxes(1, 2)
    return (matrices @ vectors_KMO[..., None])[..., 0]
