"""Bayes' rule for a Gaussian mixture, where it is exact: observations that are linear in what is unknown, plus noise.

    theta ~ sum_k w_k N(m_k, P_k),    y = H theta + noise,  noise ~ N(0, R)

Every component is updated as by a Kalman filter, and weighed by how well it foresaw y:

    S_k = H P_k H' + R,   G_k = P_k H' S_k^-1
    m_k + G_k (y - H m_k),   (I - G_k H) P_k (I - G_k H)' + G_k R G_k',   w_k N(y; H m_k, S_k) / sum_j (same of j)

The posterior is a mixture again and can be the next prior, with ``kalman_predict`` between, if theta moves.

K components, D columns of theta, M observations of R columns.

Source: Alspach and Sorenson, Nonlinear Bayesian estimation using Gaussian sum approximations, IEEE TAC 17 (1972).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._parameters import cholesky_factors, safe_log
from mixtura.density._tables import as_numpy
from mixtura.density.gaussian_mixture import GaussianMixture

Floats = NDArray[np.floating]


def kalman_update(prior: Any, Y: Any, matrix: Any, noise_cov: Any) -> GaussianMixture:
    """The exact posterior of a mixture after observations that are linear in it.

    Args:
        prior: a fitted mixture of theta.
        Y: (M, R) observations, independent of each other given theta; M may be 0.
        matrix: (R, D) H.
        noise_cov: (R, R) covariance of the noise of each, positive definite.

    Raises:
        ShapeError: if shapes do not fit.
        OptionError: if a value is not finite, noise_cov is no covariance, or prior has a noise component.
    """
    means_KD, covariances_KDD = _moments(prior)
    Y_MR, H_RD = _array("Y", Y, 2), _array("matrix", matrix, 2)
    R_RR = _covariance(noise_cov, len(H_RD), definite=True)
    if H_RD.shape[1] != means_KD.shape[1] or Y_MR.shape[1] != len(H_RD):
        raise ShapeError(f"matrix must be (R, {means_KD.shape[1]}) and Y (M, R), got {H_RD.shape} and {Y_MR.shape}")
    if not len(Y_MR):
        return GaussianMixture.from_parameters(prior.weights_, means_KD, covariances_KDD)
    y_R, R_RR = Y_MR.mean(0), R_RR / len(Y_MR)  # of independent observations the mean says all
    cross_KDR = covariances_KDD @ H_RD.T
    S_KRR = H_RD @ cross_KDR + R_RR
    gain_KDR = np.linalg.solve(S_KRR, cross_KDR.swapaxes(1, 2)).swapaxes(1, 2)
    off_KR = y_R - means_KD @ H_RD.T
    rest_KDD = np.eye(means_KD.shape[1]) - gain_KDR @ H_RD
    covariances_KDD = rest_KDD @ covariances_KDD @ rest_KDD.swapaxes(1, 2) + gain_KDR @ R_RR @ gain_KDR.swapaxes(1, 2)
    log_K = safe_log(prior.weights_) + _log_density(off_KR, S_KRR)
    weights_K = np.exp(log_K - log_K.max())
    means_KD = means_KD + np.einsum("kdr,kr->kd", gain_KDR, off_KR)
    return GaussianMixture.from_parameters(weights_K / weights_K.sum(), means_KD, covariances_KDD)


def kalman_predict(mixture: Any, matrix: Any, noise_cov: Any) -> GaussianMixture:
    """The mixture of A theta + noise: what theta will be after a linear step.

    Args:
        mixture: fitted, of theta.
        matrix: (R, D) A.
        noise_cov: (R, R) covariance of the noise.

    Raises:
        ShapeError, OptionError: as ``kalman_update``.
        SingularComponentError: if a component has no density after the step.
    """
    means_KD, covariances_KDD = _moments(mixture)
    A_RD = _array("matrix", matrix, 2)
    if A_RD.shape[1] != means_KD.shape[1]:
        raise ShapeError(f"matrix must be (R, {means_KD.shape[1]}), got {A_RD.shape}")
    Q_RR = _covariance(noise_cov, len(A_RD), definite=False)
    return GaussianMixture.from_parameters(mixture.weights_, means_KD @ A_RD.T, A_RD @ covariances_KDD @ A_RD.T + Q_RR)


def _moments(mixture: Any) -> tuple[Floats, Floats]:
    check_is_fitted(mixture)
    if mixture.noise_log_density_ is not None:
        raise OptionError("a mixture with a noise component has no linear update")
    return mixture.means_, mixture.covariances_


def _array(name: str, value: Any, ndim: int) -> Floats:
    array = np.asarray(as_numpy(value), dtype=float)
    if array.ndim != ndim:
        raise ShapeError(f"{name} must have {ndim} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise OptionError(f"{name} must be finite")
    return array


def _covariance(value: Any, R: int, *, definite: bool) -> Floats:
    R_RR = _array("noise_cov", value, 2)
    if R_RR.shape != (R, R):
        raise ShapeError(f"noise_cov must be ({R}, {R}), got {R_RR.shape}")
    least = np.linalg.eigvalsh(R_RR)[0]
    good = least > 0 if definite else least >= -1e-12 * np.abs(R_RR).max()
    if not (np.allclose(R_RR, R_RR.T) and good):
        kind = "definite" if definite else "semidefinite"
        raise OptionError(f"noise_cov must be symmetric and positive {kind}, got a least eigenvalue of {least:.3g}")
    return R_RR


def _log_density(off_KR: Floats, S_KRR: Floats) -> Floats:
    """Log of N(off; 0, S) but for a constant, (K,)."""
    factors_KRR = cholesky_factors(S_KRR)
    white_KR = np.linalg.solve(factors_KRR, off_KR[..., None])[..., 0]
    log_K: Floats = -0.5 * (white_KR**2).sum(1) - np.log(np.diagonal(factors_KRR, axis1=1, axis2=2)).sum(1)
    return log_K
