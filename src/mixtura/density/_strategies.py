"""Which way scores rows and sums their moments: products of matrices, or factors component by component.

M rows of a chunk, D columns, K components.

``_products`` has what is fast where data are centered and no component is tiny. ``Factors`` takes triangular factors
of the precisions, component by component, and differences from each mean: slower, and right for all.

The constants of the choice are nanoseconds that were measured on one core (AMD EPYC with AVX-512, OpenBLAS, float64);
only their ratios matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dtrmm, strmm

from mixtura.density._parameters import Scores
from mixtura.density._products import Frame, Moments, Products, Shared, Stacked

Floats = NDArray[np.floating]

PRECISION_LIMIT = {8: 1e7, 4: 1e3}  # of scaled data; beyond, products lose more than half of the digits
WIDEST_PRODUCTS = 48  # columns; beyond, the features of a chunk no longer stay in the cache
NARROW = 24  # columns; below, triangular products are no faster than whole ones


class Factors:
    """Scores and moments about each component's mean, one component after the other."""

    common = 0.0

    def __init__(self, scores: Scores, dtype: Any) -> None:
        self.scores, self.dtype = scores, np.dtype(dtype)
        self.reference_KD = scores.means_KD
        self.K, self.D = scores.means_KD.shape
        self.numbers = 3 * self.D + self.K
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


def choose_strategy(scores: Scores, frame: Frame, dtype: Any, algorithm: str, scatter_DD: Floats | None = None) -> Any:
    """The way that is fastest and keeps enough digits ("auto"), or what ``algorithm`` says.

    Args:
        scores: of the components.
        frame: of the data.
        dtype: of the data.
        algorithm: "auto", "gemm" or "cholesky".
        scatter_DD: second moments of all rows about the center, where all components have one covariance and those of
            all together are enough; or None.
    """
    dtype = np.dtype(dtype)
    near = algorithm == "auto" and _near(scores, frame, dtype)
    if near and scatter_DD is not None:
        return Shared(scores, frame, dtype, scatter_DD)
    chosen = Products if algorithm == "gemm" else _cheapest(scores) if near else Factors
    return Factors(scores, dtype) if chosen is Factors else chosen(scores, frame, dtype)


def _cheapest(scores: Scores) -> Any:
    """By nanoseconds of a row."""
    K, D = scores.means_KD.shape
    if scores.diagonal:
        return Products
    features = 1 + D + D * (D + 1) // 2
    costs = {
        Products: features * (1 + 0.13 * K) if D <= WIDEST_PRODUCTS else np.inf,
        Stacked: K * (0.5 * D + 0.13 * D * D),
        Factors: K * (15 + 3.2 * D + 0.055 * D * D),
    }
    return min(costs, key=costs.__getitem__)


def _near(scores: Scores, frame: Frame, dtype: np.dtype[Any]) -> bool:
    """Whether no component is so small, or so far from the center, that differences of large terms lose its digits."""
    D = scores.means_KD.shape[1]
    scale = frame.scale_D if scores.diagonal else frame.scale_D[:, None]
    sharpness = float(((scores.roots * scale) ** 2).sum(tuple(range(1, scores.roots.ndim))).max())
    reach = float((((scores.means_KD - frame.shift_D) / frame.scale_D) ** 2).max())
    return sharpness / D * max(1.0, reach) < PRECISION_LIMIT[dtype.itemsize]
