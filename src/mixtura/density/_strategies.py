"""Three ways to score rows and to sum their moments: two products for all components, or factors, own or shared.

M rows of a chunk, D columns, K components, F features.

``Products`` writes log scores as  weights_KF @ features_FM  with features 1, x, and the products x_i x_j, i <= j (or
x_i^2 alone for diagonal families); the same features times responsibilities are the moments. Symmetry halves the work
and no loop runs over components. It needs data that are centered and scaled: otherwise large terms cancel. ``Factors``
takes triangular factors of the precisions, component by component, and differences from each mean: slower, and right
also for components that are tiny compared with the data. ``SharedFactor`` does the same once for all components, where
they have one covariance.

The constants of the choice are nanoseconds that were measured on one core (AMD EPYC with AVX-512, OpenBLAS, float64);
only their ratios matter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dtrmm, strmm

from mixtura.density._parameters import Scores

Floats = NDArray[np.floating]
Moments = tuple[Floats, Floats, Floats]  # count_K, first_KD, second

PRECISION_LIMIT = {8: 1e7, 4: 1e3}  # of scaled data; beyond, products lose more than half of the digits
WIDEST_PRODUCTS = 48  # columns; beyond, the features of a chunk no longer stay in the cache
UNSCALED = {8: 1e50, 4: 1e4}  # columns of larger or smaller deviations are scaled, lest their squares overflow
NARROW = 24  # columns; below, triangular products are no faster than whole ones


class Frame(NamedTuple):
    """Center and scale of the columns, in which products are formed."""

    shift_D: Floats
    scale_D: Floats


class Products:
    """Scores and moments as two products with a table of features."""

    def __init__(self, scores: Scores, frame: Frame, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.shift_D = frame.shift_D.astype(self.dtype)
        limit = UNSCALED[self.dtype.itemsize]
        self.scaled = not ((frame.scale_D < limit) & (frame.scale_D > 1 / limit)).all()
        scale_D = frame.scale_D if self.scaled else np.ones_like(frame.scale_D)
        self.frame = Frame(self.shift_D.astype(np.float64), scale_D)
        self.inverse_D = (1 / scale_D).astype(self.dtype)
        self.diagonal = scores.diagonal
        self.K, self.D = scores.means_KD.shape
        self.upper = np.triu_indices(self.D)
        self.without_weight_K = np.isneginf(scores.constants_K)  # kept out of the product, where inf * 0 is invalid
        constants_K = np.where(self.without_weight_K, 0.0, scores.constants_K)
        self.weights_KF = self._weights(scores._replace(constants_K=constants_K)).astype(self.dtype)
        self.reference_KD = np.repeat(self.frame.shift_D[None], self.K, 0)
        self.n_features = self.weights_KF.shape[1]

    def _weights(self, scores: Scores) -> Floats:
        scale_D = self.frame.scale_D
        means_KD = (scores.means_KD - self.frame.shift_D) / scale_D
        if self.diagonal:
            precision_KD = (scores.roots * scale_D) ** 2
            linear_KD = precision_KD * means_KD
            second = -0.5 * precision_KD
        else:
            roots = scores.roots * scale_D[:, None]
            precision_KDD = roots @ roots.swapaxes(1, 2)
            linear_KD = np.einsum("kij,kj->ki", precision_KDD, means_KD)
            i, j = self.upper
            second = precision_KDD[:, i, j] * np.where(i == j, -0.5, -1.0)
        constants_K = scores.constants_K - 0.5 * (means_KD * linear_KD).sum(1)
        return np.hstack([constants_K[:, None], linear_KD, second])

    def features(self, x_MD: Floats) -> Floats:
        """Features (F, M) of rows in the units of the data."""
        D = self.D
        out_FM = np.empty((self.n_features, len(x_MD)), self.dtype)
        out_FM[0] = 1
        z_DM = out_FM[1 : 1 + D]
        np.subtract(x_MD.T, self.shift_D[:, None], out=z_DM)
        if self.scaled:
            z_DM *= self.inverse_D[:, None]
        if self.diagonal:
            np.multiply(z_DM, z_DM, out=out_FM[1 + D :])
            return out_FM
        at = 1 + D
        for i in range(D):
            np.multiply(z_DM[i:], z_DM[i], out=out_FM[at : at + D - i])
            at += D - i
        return out_FM

    def log_scores(self, features_FM: Floats) -> Floats:
        """Log scores (K, M)."""
        out_KM = self.weights_KF @ features_FM
        out_KM[self.without_weight_K] = -np.inf
        return out_KM

    def moments(self, responsibilities_KM: Floats, features_FM: Floats) -> Floats:
        """Sums (K, F), to be added up and given to ``unpack``."""
        return (responsibilities_KM @ features_FM.T).astype(np.float64, copy=False)

    def unpack(self, sums_KF: Floats) -> Moments:
        """Counts and moments about ``reference_KD`` in the units of the data."""
        D, scale_D = self.D, self.frame.scale_D
        first_KD, second = sums_KF[:, 1 : 1 + D] * scale_D, sums_KF[:, 1 + D :]
        if self.diagonal:
            return sums_KF[:, 0], first_KD, second * scale_D**2
        i, j = self.upper
        second_KDD = np.empty((self.K, D, D))
        second_KDD[:, i, j] = second * (scale_D[i] * scale_D[j])
        second_KDD[:, j, i] = second_KDD[:, i, j]
        return sums_KF[:, 0], first_KD, second_KDD


class Factors:
    """Scores and moments about each component's mean, one component after the other."""

    def __init__(self, scores: Scores, dtype: Any) -> None:
        self.scores, self.dtype = scores, np.dtype(dtype)
        self.reference_KD = scores.means_KD
        self.K, self.D = scores.means_KD.shape
        self.n_features = 2 * self.D
        self.roots = scores.roots.astype(self.dtype)
        if not scores.diagonal:
            self.roots = [np.asfortranarray(root_DD) for root_DD in self.roots]

    def features(self, x_MD: Floats) -> Floats:
        """The rows themselves."""
        return x_MD

    def _differences(self, x_MD: Floats, k: int) -> Floats:
        return (x_MD - self.reference_KD[k]).astype(self.dtype, copy=False)

    def log_scores(self, x_MD: Floats) -> Floats:
        """Log scores (K, M)."""
        out_KM = np.empty((self.K, len(x_MD)), self.dtype)
        for k, constant in enumerate(self.scores.constants_K):
            y_MD = self._differences(x_MD, k)
            y_MD = y_MD * self.roots[k] if self.scores.diagonal else whiten(y_MD, self.roots[k])
            out_KM[k] = constant - 0.5 * np.einsum("md,md->m", y_MD, y_MD)
        return out_KM

    def moments(self, responsibilities_KM: Floats, x_MD: Floats) -> Floats:
        """Sums (K, 1 + D + D or D * D), to be added up and given to ``unpack``."""
        rows = []
        for k, share_M in enumerate(responsibilities_KM):
            y_MD = self._differences(x_MD, k)
            second = share_M @ (y_MD * y_MD) if self.scores.diagonal else gram(y_MD, share_M).ravel()
            rows.append(np.concatenate([[share_M.sum()], share_M @ y_MD, second]))
        return np.asarray(rows, dtype=np.float64)

    def unpack(self, sums_KF: Floats) -> Moments:
        """Counts and moments about ``reference_KD``."""
        K, D = self.K, self.D
        second = sums_KF[:, 1 + D :]
        return sums_KF[:, 0], sums_KF[:, 1 : 1 + D], second if self.scores.diagonal else second.reshape(K, D, D)


class SharedFactor:
    """Scores and moments where all components have one covariance: rows are whitened once, second moments are pooled.

    The pooled second moments are about the center of the data, of all components together: (1, D, D).
    """

    def __init__(self, scores: Scores, frame: Frame, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.shift_D = frame.shift_D.astype(self.dtype)
        self.K, self.D = scores.means_KD.shape
        self.root_DD = np.asfortranarray(scores.roots[0].astype(self.dtype))
        means_KD = (scores.means_KD - self.shift_D.astype(np.float64)) @ scores.roots[0]
        self.means_KD = means_KD.astype(self.dtype)
        self.constants_K1 = (scores.constants_K - 0.5 * (means_KD**2).sum(1)).astype(self.dtype)[:, None]
        self.reference_KD = np.repeat(self.shift_D.astype(np.float64)[None], self.K, 0)
        self.n_features = 3 * self.D

    def features(self, x_MD: Floats) -> Floats:
        """Rows less the center."""
        return x_MD - self.shift_D

    def log_scores(self, z_MD: Floats) -> Floats:
        """Log scores (K, M)."""
        y_MD = whiten(z_MD.copy(), self.root_DD)
        out_KM = self.means_KD @ y_MD.T
        out_KM += self.constants_K1
        out_KM -= 0.5 * np.einsum("md,md->m", y_MD, y_MD)
        return out_KM

    def moments(self, responsibilities_KM: Floats, z_MD: Floats) -> Floats:
        """Sums (K + D, D + 1): counts and first moments of the components, then pooled second moments."""
        out = np.zeros((self.K + self.D, self.D + 1))
        out[: self.K, 0] = responsibilities_KM.sum(1, dtype=np.float64)
        out[: self.K, 1:] = responsibilities_KM @ z_MD
        out[self.K :, 1:] = gram(z_MD, responsibilities_KM.sum(0))
        return out

    def unpack(self, sums: Floats) -> Moments:
        """Counts and moments about the center; the second ones pooled."""
        return sums[: self.K, 0], sums[: self.K, 1:], sums[None, self.K :, 1:]


def whiten(y_MD: Floats, root_DD: Floats) -> Floats:
    """y @ U for an upper triangle U in Fortran order; ``y_MD`` may be overwritten."""
    if len(root_DD) < NARROW:
        return y_MD @ root_DD
    multiply = dtrmm if y_MD.dtype == np.float64 else strmm
    return multiply(1.0, root_DD, y_MD.T, trans_a=1, overwrite_b=1).T


def gram(y_MD: Floats, share_M: Floats) -> Floats:
    """Sum of share * y y.T over the rows, (D, D); symmetric, so that half of it is computed."""
    if y_MD.shape[1] < NARROW:
        return (y_MD * share_M[:, None]).T @ y_MD
    y_MD = y_MD * np.sqrt(share_M)[:, None]
    return y_MD.T @ y_MD


def choose_strategy(scores: Scores, frame: Frame, dtype: Any, algorithm: str, *, pooled: bool = False) -> Any:
    """The way that is fastest and keeps enough digits ("auto"), or what ``algorithm`` says.

    Args:
        scores: of the components.
        frame: of the data.
        dtype: of the data.
        algorithm: "auto", "gemm" or "cholesky".
        pooled: whether second moments may be those of all components together.
    """
    dtype = np.dtype(dtype)
    if algorithm == "auto" and pooled and _near(scores, frame, dtype):
        return SharedFactor(scores, frame, dtype)
    if algorithm == "gemm" or (algorithm == "auto" and _near(scores, frame, dtype) and _products_pay(scores)):
        return Products(scores, frame, dtype)
    return Factors(scores, dtype)


def _products_pay(scores: Scores) -> bool:
    """Whether two products cost less than a factor for each component."""
    K, D = scores.means_KD.shape
    if scores.diagonal:
        return True
    features = 1 + D + D * (D + 1) // 2
    products = features * (0.5 + max(0.8, 0.1 * K))
    return D <= WIDEST_PRODUCTS and products < K * (30 + 0.09 * D * D)


def _near(scores: Scores, frame: Frame, dtype: np.dtype[Any]) -> bool:
    """Whether no component is so small, or so far from the center, that differences of large terms lose its digits."""
    D = scores.means_KD.shape[1]
    scale = frame.scale_D if scores.diagonal else frame.scale_D[:, None]
    sharpness = float(((scores.roots * scale) ** 2).sum(tuple(range(1, scores.roots.ndim))).max())
    reach = float((((scores.means_KD - frame.shift_D) / frame.scale_D) ** 2).max())
    return sharpness / D * max(1.0, reach) < PRECISION_LIMIT[dtype.itemsize]
