"""The 14 covariance families of mclust, and their maximum-likelihood updates.

S_k = volume * orientation @ shape @ orientation.T, and each of the three letters of a family says of one factor whether
it is equal for all components (E), variable (V), or the identity (I). K components, D columns. ``scatter`` holds the
weighted scatter matrices W_k about the means, (K, D, D), or their diagonals (K, D) for the six families of orientation
I; ``count_K`` the weights n_k. Every update maximizes  -1/2 sum_k (n_k log|S_k| + tr(W_k S_k^-1)).

With own orientations (V) the problem is that of the diagonal family of the same first two letters, on eigenvalues.

Source: Celeux and Govaert, Gaussian parsimonious clustering models, Pattern Recognition 28 (1995), tables 1 and 2;
common orientations (EVE, VVE) by rotations of pairs, each exact: Flury and Gautschi, SIAM J. Sci. Stat. Comput. 7
(1986).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import unknown_name
from mixtura.density._orientation import common_shape, rotate_jointly, varying_shape

Floats = NDArray[np.floating]

FAMILIES = ("EII", "VII", "EEI", "VEI", "EVI", "VVI", "EEE", "VEE", "EVE", "VVE", "EEV", "VEV", "EVV", "VVV")
ALIASES = {"full": "VVV", "tied": "EEE", "diag": "VVI", "spherical": "VII"}


class Family(NamedTuple):
    """A covariance family: the letters of its volume, shape and orientation."""

    volume: str
    shape: str
    orientation: str

    @property
    def name(self) -> str:
        """The three letters."""
        return "".join(self)

    @property
    def diagonal(self) -> bool:
        """Whether every covariance is diagonal; it is then kept as (K, D)."""
        return self.orientation == "I"

    def n_parameters(self, K: int, D: int) -> int:
        """Free parameters of K covariances of D columns."""
        copies = {"I": 0, "E": 1, "V": K}
        turns = D * (D - 1) // 2
        return copies[self.volume] + copies[self.shape] * (D - 1) + copies[self.orientation] * turns


def find_family(name: str) -> Family:
    """The family of a name of mclust ("VVV") or of scikit-learn ("full", "tied", "diag", "spherical").

    Raises:
        UnknownNameError: if it is neither; the nearest name is offered.
    """
    letters = ALIASES.get(name, name) if isinstance(name, str) else name
    if letters not in FAMILIES:
        raise unknown_name("covariance family", str(name), [*FAMILIES, *ALIASES])
    return Family(*letters)


def fit_covariances(family: Family, scatter: Floats, count_K: Floats, previous: Floats | None = None) -> Floats:
    """The covariances of a family that maximize the likelihood of the scatter matrices.

    Args:
        family: which.
        scatter: W_k, (K, D, D), or their diagonals (K, D) if the family is diagonal; for EEE also their sum (1, D, D).
        count_K: n_k, positive.
        previous: covariances to go on from, (K, D, D). EVE and VVE have several optima; from there the likelihood
            cannot fall.

    Returns:
        Covariances (K, D, D) or (K, D). Where a component is singular they are not positive or not finite.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        if family.diagonal:
            return _spread(family, scatter, count_K)
        if family.name == "VVV":
            return scatter / count_K[:, None, None]
        if family.orientation == "V":
            return _own_orientations(family, scatter, count_K)
        if family.shape == "E":
            return _common_matrix(family, scatter, count_K)
        return _common_orientation(family, scatter, count_K, previous)


def deviance(scatter: Floats, count_K: Floats, covariances: Floats) -> float:
    """sum_k (n_k log|S_k| + tr(W_k S_k^-1)), which the updates minimize; for matrices (K, D, D)."""
    _, logs_K = np.linalg.slogdet(covariances)
    traces_K = np.trace(np.linalg.solve(covariances, scatter), axis1=1, axis2=2)
    return float(count_K @ logs_K + traces_K.sum())


def _spread(family: Family, spread_KD: Floats, count_K: Floats) -> Floats:
    """Variances of the diagonal family with the same volume and shape."""
    K, D = spread_KD.shape
    if family.shape == "I":
        mean_K = spread_KD.mean(1)
        level_K = mean_K / count_K if family.volume == "V" else np.full(K, mean_K.sum() / count_K.sum())
        return np.repeat(level_K[:, None], D, 1)
    if family.shape == "E":
        if family.volume == "E":
            return np.repeat((spread_KD.sum(0) / count_K.sum())[None], K, 0)
        return common_shape(spread_KD, count_K)
    return spread_KD / count_K[:, None] if family.volume == "V" else varying_shape(spread_KD, count_K)


def _own_orientations(family: Family, scatter_KDD: Floats, count_K: Floats) -> Floats:
    values_KD, turns_KDD = _eigh(scatter_KDD)
    spread_KD = _spread(family, values_KD, count_K)
    return (turns_KDD * spread_KD[:, None]) @ turns_KDD.swapaxes(1, 2)


def _common_matrix(family: Family, scatter_KDD: Floats, count_K: Floats, *, rounds: int = 500) -> Floats:
    """EEE, and VEE: S_k = volume_k * C with |C| = 1, by turns until neither moves."""
    K, D = len(count_K), scatter_KDD.shape[1]
    if family.volume == "E":
        return np.repeat((scatter_KDD.sum(0) / count_K.sum())[None], K, 0)
    volume_K = np.trace(scatter_KDD, axis1=1, axis2=2) / (D * count_K)
    for _ in range(rounds):
        pooled_DD = (scatter_KDD / volume_K[:, None, None]).sum(0)
        _, log_det = np.linalg.slogdet(pooled_DD)
        if not np.isfinite(log_det):
            return np.full_like(scatter_KDD, np.nan)
        common_DD = pooled_DD / np.exp(log_det / D)
        before_K, volume_K = (
            volume_K,
            np.trace(np.linalg.solve(common_DD, scatter_KDD), axis1=1, axis2=2) / (D * count_K),
        )
        if not np.any(np.abs(volume_K - before_K) > 1e-13 * volume_K):
            break
    return volume_K[:, None, None] * common_DD


def _common_orientation(
    family: Family, scatter_KDD: Floats, count_K: Floats, previous: Floats | None, *, rounds: int = 100
) -> Floats:
    """EVE and VVE: shapes given the orientation, then the orientation given the shapes, until neither moves."""
    turn_DD = _eigh(scatter_KDD.sum(0) if previous is None else _pencil(previous))[1]
    turned_KDD = turn_DD.T @ scatter_KDD @ turn_DD
    before = np.inf
    for _ in range(rounds):
        spread_KD = _spread(family, np.diagonal(turned_KDD, axis1=1, axis2=2), count_K)
        now = float(count_K @ np.log(spread_KD).sum(1))  # the trace term is constant at the best shapes
        if not before - now > 1e-13 * count_K.sum():
            break
        before = now
        turn_DD = turn_DD @ rotate_jointly(turned_KDD, 1 / spread_KD)
        turned_KDD = turn_DD.T @ scatter_KDD @ turn_DD
    return (turn_DD * spread_KD[:, None]) @ turn_DD.T


def _pencil(covariances_KDD: Floats) -> Floats:
    """One matrix whose eigenvectors are those that all of the covariances share; the weights keep eigenvalues apart."""
    K = len(covariances_KDD)
    scale_K = np.trace(covariances_KDD, axis1=1, axis2=2)
    return np.einsum("k,kij->ij", (1 + np.arange(K) / np.pi) / scale_K, covariances_KDD)


def _eigh(matrices: Floats) -> tuple[Floats, Floats]:
    if not np.isfinite(matrices).all():
        return np.full(matrices.shape[:-1], np.nan), np.full_like(matrices, np.nan)
    return np.linalg.eigh(matrices)
