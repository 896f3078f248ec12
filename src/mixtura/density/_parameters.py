"""What a mixture is made of, and the quadratic form by which a row is scored.

N rows, D columns, K components. Covariances are (K, D, D), or (K, D) where they are diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.density.errors import SingularComponentError

Floats = NDArray[np.floating]
LOG_2PI = float(np.log(2 * np.pi))


class Parameters(NamedTuple):
    """Weights, means and covariances of K components, in the units of the data.

    Attributes:
        weights_K: of the components; they and ``noise_weight`` sum to 1.
        means_KD: means.
        covariances: (K, D, D), or (K, D) where they are diagonal.
        noise_weight: weight of the noise component, 0 without one.
    """

    weights_K: Floats
    means_KD: Floats
    covariances: Floats
    noise_weight: float = 0.0

    @property
    def full(self) -> Floats:
        """The covariances as matrices, (K, D, D)."""
        return full_covariances(self.covariances)

    def with_(self, **changes: Floats | float) -> Parameters:
        """The same with other values of some fields."""
        return self._replace(**changes)


class Scores(NamedTuple):
    """Log scores ``constants_K - 1/2 |(x - means_k) @ roots_k|^2``: log densities times weights, or a bound of them.

    Attributes:
        constants_K: score at the mean.
        means_KD: means.
        roots: upper triangles U with U @ U.T the precision, (K, D, D), or its diagonal (K, D).
    """

    constants_K: Floats
    means_KD: Floats
    roots: Floats

    @property
    def diagonal(self) -> bool:
        """Whether the precisions are diagonal."""
        return self.roots.ndim == 2


def full_covariances(covariances: Floats) -> Floats:
    """Covariances as matrices (K, D, D), from those or from diagonals (K, D)."""
    if covariances.ndim == 3:
        return covariances
    return covariances[:, :, None] * np.eye(covariances.shape[1])


def scores_of(parameters: Parameters) -> Scores:
    """Scores that are log weight + log density.

    Raises:
        SingularComponentError: if a covariance is not positive definite.
    """
    roots = precision_roots(parameters.covariances)
    diagonals_KD = roots if roots.ndim == 2 else np.diagonal(roots, axis1=1, axis2=2)
    log_roots_K = np.log(diagonals_KD).sum(1)
    constants_K = safe_log(parameters.weights_K) + log_roots_K - 0.5 * diagonals_KD.shape[1] * LOG_2PI
    return Scores(constants_K, parameters.means_KD, roots)


def safe_log(x: Floats) -> Floats:
    """Logarithm, -inf at 0 without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(x)


def precision_roots(covariances: Floats) -> Floats:
    """Upper triangles U with U @ U.T = S^-1, (K, D, D), or 1 / standard deviations (K, D).

    Raises:
        SingularComponentError: if a covariance is not positive definite.
    """
    if covariances.ndim == 2:
        _refuse(~((covariances > 0) & np.isfinite(covariances)).all(1))
        return 1 / np.sqrt(covariances)
    return np.linalg.inv(cholesky_factors(covariances)).swapaxes(1, 2)


def cholesky_factors(covariances_KDD: Floats) -> Floats:
    """Lower triangles L with L @ L.T = S.

    Raises:
        SingularComponentError: if a covariance is not positive definite.
    """
    _refuse(~np.isfinite(covariances_KDD).all((1, 2)))
    try:
        factors_KDD = np.linalg.cholesky(covariances_KDD)
    except np.linalg.LinAlgError:
        _refuse(np.array([not _positive(one_DD) for one_DD in covariances_KDD]))
        raise
    squares_KD = np.diagonal(factors_KDD, axis1=1, axis2=2) ** 2
    rounding = 16 * covariances_KDD.shape[1] * np.finfo(np.float64).eps
    _refuse(~(squares_KD > rounding * np.diagonal(covariances_KDD, axis1=1, axis2=2)).all(1))
    return factors_KDD


def _positive(matrix_DD: Floats) -> bool:
    try:
        np.linalg.cholesky(matrix_DD)
    except np.linalg.LinAlgError:
        return False
    return True


def _refuse(singular_K: NDArray[np.bool_]) -> None:
    if singular_K.any():
        k = int(np.flatnonzero(singular_K)[0])
        raise SingularComponentError(
            f"component {k} has a covariance that is not positive definite: it holds too few distinct rows, or columns "
            "depend on each other; use fewer components, a family with fewer parameters, a larger reg_covar, or a "
            "prior with a psi"
        )
