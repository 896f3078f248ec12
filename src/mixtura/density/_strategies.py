"""Two ways to score rows and to sum their moments: two matrix products for all components, or factors one by one.

M rows of a chunk, D columns, K components, F features.

``Products`` writes log scores as  weights_KF @ features_FM  with features 1, x, and the products x_i x_j, i <= j (or
x_i^2 alone for diagonal families); the same features times responsibilities are the moments. Symmetry halves the work
and no loop runs over components. It needs data that are centered and scaled: otherwise large terms cancel. ``Factors``
takes triangular factors of the precisions, component by component, and differences from each mean: slower, and right
also for components that are tiny compared with the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.density._parameters import Scores

Floats = NDArray[np.floating]
Moments = tuple[Floats, Floats, Floats]  # count_K, first_KD, second

PRECISION_LIMIT = {8: 1e7, 4: 1e3}  # of scaled data; beyond, products lose more than half of the digits
WIDEST_PRODUCTS = 32  # columns; beyond, the features of a chunk no longer stay in the cache


class Frame(NamedTuple):
    """Center and scale of the columns, in which products are formed."""

    shift_D: Floats
    scale_D: Floats


class Products:
    """Scores and moments as two products with a table of features."""

    def __init__(self, scores: Scores, frame: Frame, dtype: Any) -> None:
        self.frame, self.dtype = frame, np.dtype(dtype)
        self.diagonal = scores.diagonal
        self.K, self.D = scores.means_KD.shape
        self.upper = np.triu_indices(self.D)
        self.weights_KF = self._weights(scores).astype(self.dtype)
        self.reference_KD = np.repeat(frame.shift_D[None], self.K, 0)
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
        z_DM[...] = ((x_MD - self.frame.shift_D) / self.frame.scale_D).T
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
        return self.weights_KF @ features_FM

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
        self.roots = scores.roots.astype(self.dtype)
        self.reference_KD = scores.means_KD
        self.K, self.D = scores.means_KD.shape
        self.n_features = 2 * self.D

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
            y_MD = y_MD * self.roots[k] if self.scores.diagonal else y_MD @ self.roots[k]
            out_KM[k] = constant - 0.5 * np.einsum("md,md->m", y_MD, y_MD)
        return out_KM

    def moments(self, responsibilities_KM: Floats, x_MD: Floats) -> Floats:
        """Sums (K, 1 + D + D or D * D), to be added up and given to ``unpack``."""
        rows = []
        for k, share_M in enumerate(responsibilities_KM):
            y_MD = self._differences(x_MD, k)
            weighted_MD = y_MD * share_M[:, None]
            second = (weighted_MD * y_MD).sum(0) if self.scores.diagonal else (weighted_MD.T @ y_MD).ravel()
            rows.append(np.concatenate([[share_M.sum()], weighted_MD.sum(0), second]))
        return np.asarray(rows, dtype=np.float64)

    def unpack(self, sums_KF: Floats) -> Moments:
        """Counts and moments about ``reference_KD``."""
        K, D = self.K, self.D
        second = sums_KF[:, 1 + D :]
        return sums_KF[:, 0], sums_KF[:, 1 : 1 + D], second if self.scores.diagonal else second.reshape(K, D, D)


def choose_strategy(scores: Scores, frame: Frame, dtype: Any, algorithm: str) -> Products | Factors:
    """``Products`` where it is faster and keeps enough digits ("auto"), or what ``algorithm`` says."""
    if algorithm == "gemm" or (algorithm == "auto" and _products_fit(scores, frame, np.dtype(dtype))):
        return Products(scores, frame, dtype)
    return Factors(scores, dtype)


def _products_fit(scores: Scores, frame: Frame, dtype: np.dtype[Any]) -> bool:
    D = scores.means_KD.shape[1]
    if not scores.diagonal and D > WIDEST_PRODUCTS:
        return False
    scale = frame.scale_D if scores.diagonal else frame.scale_D[:, None]
    sharpness = float(((scores.roots * scale) ** 2).sum(tuple(range(1, scores.roots.ndim))).max())
    reach = float((((scores.means_KD - frame.shift_D) / frame.scale_D) ** 2).max())
    return sharpness / D * max(1.0, reach) < PRECISION_LIMIT[dtype.itemsize]
