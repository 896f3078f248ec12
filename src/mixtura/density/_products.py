"""Scores and moments by products of matrices with a table of features: what is fast for data near their center.

M rows of a chunk, D columns, K components, F features. Rows are centered and stand in columns: features (F, M) begin
with 1 and x. No loop runs over components to score. Large terms cancel where components are tiny compared with the
data or far from their center; ``_strategies`` chooses.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.density._parameters import Scores

Floats = NDArray[np.floating]
Moments = tuple[Floats, Floats, Floats]  # count_K, first_KD, second

UNSCALED = {8: 1e50, 4: 1e4}  # columns of larger or smaller deviations are scaled, lest their squares overflow


class Frame(NamedTuple):
    """Center and scale of the columns, in which products are formed."""

    shift_D: Floats
    scale_D: Floats


class Centered:
    """Features 1 and x, centered, and scaled where units are extreme; the way from there to the units of the data.

    Attributes:
        common: log likelihood of all rows that ``log_scores`` leave out since all components share it.
        numbers: that a row takes while it is worked on.
    """

    common = 0.0

    def __init__(self, scores: Scores, frame: Frame, dtype: Any, n_features: int) -> None:
        self.dtype, self.n_features = np.dtype(dtype), n_features
        self.K, self.D = scores.means_KD.shape
        self.numbers = self.D + n_features + self.K
        limit = UNSCALED[self.dtype.itemsize]
        self.scaled = not ((frame.scale_D < limit) & (frame.scale_D > 1 / limit)).all()
        self.shift_D = frame.shift_D.astype(self.dtype)
        self.scale_D = frame.scale_D if self.scaled else np.ones_like(frame.scale_D)
        self.center_D = self.shift_D.astype(np.float64)
        self.means_KD = (scores.means_KD - self.center_D) / self.scale_D  # in the frame
        self.reference_KD = np.repeat(self.center_D[None], self.K, 0)

    def features(self, x_MD: Floats) -> Floats:
        """Features (F, M) of rows in the units of the data; those after 1 and x are not set yet."""
        out_FM = np.empty((self.n_features, len(x_MD)), self.dtype)
        out_FM[0] = 1
        z_DM = out_FM[1 : 1 + self.D]
        np.subtract(x_MD.T, self.shift_D[:, None], out=z_DM)
        if self.scaled:
            z_DM *= (1 / self.scale_D).astype(self.dtype)[:, None]
        return out_FM


class Products(Centered):
    """Log scores as  weights_KF @ features_FM, with x_i x_j, i <= j (or x_i^2 alone for diagonal families) as features.

    The same features times responsibilities are the moments. Symmetry halves the work.
    """

    def __init__(self, scores: Scores, frame: Frame, dtype: Any) -> None:
        D = len(frame.shift_D)
        super().__init__(scores, frame, dtype, 1 + D + (D if scores.diagonal else D * (D + 1) // 2))
        self.diagonal = scores.diagonal
        constants_K, self.without_weight_K = finite_constants(scores)
        linear_KD, second = self._quadratic(scores)
        constants_K = constants_K - 0.5 * (self.means_KD * linear_KD).sum(1)
        self.weights_KF = np.hstack([constants_K[:, None], linear_KD, second]).astype(self.dtype)

    def _quadratic(self, scores: Scores) -> tuple[Floats, Floats]:
        """Precision times mean (K, D), and what second-degree features weigh."""
        if self.diagonal:
            precision_KD = (scores.roots * self.scale_D) ** 2
            return precision_KD * self.means_KD, -0.5 * precision_KD
        roots = scores.roots * self.scale_D[:, None]
        precision_KDD = roots @ roots.swapaxes(1, 2)
        i, j = upper_triangle(self.D)
        weights = np.where(i == j, -0.5, -1.0)
        return np.einsum("kij,kj->ki", precision_KDD, self.means_KD), precision_KDD[:, i, j] * weights

    def features(self, x_MD: Floats) -> Floats:
        """Features (F, M) of rows in the units of the data."""
        out_FM, at = super().features(x_MD), 1 + self.D
        z_DM = out_FM[1:at]
        if self.diagonal:
            np.multiply(z_DM, z_DM, out=out_FM[at:])
            return out_FM
        for i in range(self.D):
            np.multiply(z_DM[i:], z_DM[i], out=out_FM[at : at + self.D - i])
            at += self.D - i
        return out_FM

    def log_scores(self, features_FM: Floats) -> Floats:
        """Log scores (K, M)."""
        out_KM = self.weights_KF @ features_FM
        if self.without_weight_K.any():
            out_KM[self.without_weight_K] = -np.inf
        return out_KM

    def moments(self, responsibilities_KM: Floats, features_FM: Floats) -> Floats:
        """Sums (K, F), to be added up and given to ``unpack``."""
        return (responsibilities_KM @ features_FM.T).astype(np.float64, copy=False)

    def unpack(self, sums_KF: Floats) -> Moments:
        """Counts and moments about ``reference_KD`` in the units of the data."""
        D, scale_D = self.D, self.scale_D
        first_KD, second = sums_KF[:, 1 : 1 + D] * scale_D, sums_KF[:, 1 + D :]
        if self.diagonal:
            return sums_KF[:, 0], first_KD, second * scale_D**2
        i, j = upper_triangle(D)
        second_KDD = np.empty((self.K, D, D))
        second_KDD[:, i, j] = second * (scale_D[i] * scale_D[j])
        second_KDD[:, j, i] = second_KDD[:, i, j]
        return sums_KF[:, 0], first_KD, second_KDD


class Shared(Centered):
    """Where all components have one covariance: what separates them is linear in x.

    The quadratic term is the same for all and left to ``common``; second moments of all components together, about the
    center, are those of the data whatever the responsibilities, as long as these sum to 1 in each row.

    Args:
        scores: with roots that are all the same.
        frame: center and scale.
        dtype: of the data.
        scatter_DD: weighted second moments of all rows about the center, in the units of the data.
    """

    def __init__(self, scores: Scores, frame: Frame, dtype: Any, scatter_DD: Floats) -> None:
        super().__init__(scores, frame, dtype, 1 + len(frame.shift_D))
        self.scatter_DD = scatter_DD
        constants_K, self.without_weight_K = finite_constants(scores)
        root_DD = scores.roots[0]
        white_KD = (self.means_KD * self.scale_D) @ root_DD
        linear_KD = white_KD @ root_DD.T * self.scale_D
        constants_K = constants_K - 0.5 * (white_KD**2).sum(1)
        self.weights_KF = np.hstack([constants_K[:, None], linear_KD]).astype(self.dtype)
        self.common = -0.5 * float(np.sum((scatter_DD @ root_DD) * root_DD))

    log_scores = Products.log_scores
    moments = Products.moments

    def unpack(self, sums_KF: Floats) -> Moments:
        """Counts and moments about the center in the units of the data; the second ones pooled, (1, D, D)."""
        return sums_KF[:, 0], sums_KF[:, 1:] * self.scale_D, self.scatter_DD[None]


class Stacked(Centered):
    """Factors of all components in one product, squares summed; the moments of 1 and x are one product a component.

    Cheaper than ``Products`` for few components or many columns.
    """

    def __init__(self, scores: Scores, frame: Frame, dtype: Any) -> None:
        D = len(frame.shift_D)
        super().__init__(scores, frame, dtype, 1 + D)
        self.constants_K1 = scores.constants_K.astype(self.dtype)[:, None]
        roots_KDD = (scores.roots * self.scale_D[:, None]).swapaxes(1, 2)
        offsets_KD = -np.einsum("kij,kj->ki", roots_KDD, self.means_KD)
        weights = np.concatenate([offsets_KD[:, :, None], roots_KDD], 2)
        self.weights = weights.reshape(self.K * D, 1 + D).astype(self.dtype)
        self.numbers += len(self.weights) + self.n_features

    def log_scores(self, features_FM: Floats) -> Floats:
        """Log scores (K, M)."""
        white_KDM = (self.weights @ features_FM).reshape(self.K, self.D, -1)
        out_KM = np.einsum("kdm,kdm->km", white_KDM, white_KDM)
        out_KM *= -0.5
        out_KM += self.constants_K1
        return out_KM

    def moments(self, responsibilities_KM: Floats, features_FM: Floats) -> Floats:
        """Sums (K, 1 + D, 1 + D), to be added up and given to ``unpack``."""
        shared_FM = np.empty_like(features_FM)
        out = np.empty((self.K, self.n_features, self.n_features))
        for k, share_M in enumerate(responsibilities_KM):
            np.multiply(features_FM, share_M, out=shared_FM)
            out[k] = shared_FM @ features_FM.T
        return out

    def unpack(self, sums: Floats) -> Moments:
        """Counts and moments about the center in the units of the data."""
        scale_D = self.scale_D
        return sums[:, 0, 0], sums[:, 0, 1:] * scale_D, sums[:, 1:, 1:] * np.outer(scale_D, scale_D)


def finite_constants(scores: Scores) -> tuple[Floats, NDArray[np.bool_]]:
    """Constants with 0 for components without weight, since -inf * 0 is invalid in a product; and which those are."""
    without_weight_K = np.isneginf(scores.constants_K)
    return np.where(without_weight_K, 0.0, scores.constants_K), without_weight_K


@cache
def upper_triangle(D: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the upper triangle of a matrix (D, D)."""
    return np.triu_indices(D)
