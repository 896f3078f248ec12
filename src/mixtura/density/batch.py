"""A Gaussian mixture for each row: what a joint mixture says of some columns once the others are known.

N rows, K components, D columns left. Components share their covariances over the rows; weights and means differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import random_numbers
from mixtura.density._em import normalize
from mixtura.density._parameters import LOG_2PI, cholesky_factors, safe_log
from mixtura.density._tables import as_numpy

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class GaussianMixtureBatch:
    """N Gaussian mixtures of K components.

    Attributes:
        weights: (N, K), summing to 1 in each row.
        means: (N, K, D)
        covariances: (K, D, D)
    """

    weights: Floats
    means: Floats
    covariances: Floats

    def __len__(self) -> int:
        return len(self.weights)

    def mean(self) -> Floats:
        """Mean of each mixture, (N, D)."""
        return np.einsum("nk,nkd->nd", self.weights, self.means)

    def covariance(self) -> Floats:
        """Covariance of each mixture, (N, D, D): within components, and between their means."""
        between_NKD = self.means - self.mean()[:, None]
        within = np.einsum("nk,kij->nij", self.weights, self.covariances)
        return within + np.einsum("nk,nki,nkj->nij", self.weights, between_NKD, between_NKD)

    def score_samples(self, Y: Any) -> Floats:
        """Log density of one row of values under each mixture.

        Args:
            Y: (N, D)

        Raises:
            ShapeError: if it has another shape.
            OptionError: if it is not finite.
        """
        Y = np.asarray(as_numpy(Y), dtype=float)
        N, _, D = self.means.shape
        if Y.shape != (N, D):
            raise ShapeError(f"Y must be ({N}, {D}), got {Y.shape}")
        if not np.isfinite(Y).all():
            raise OptionError("Y must be finite, got NaN or infinity")
        factors_KDD = cholesky_factors(self.covariances)
        white_KND = (Y - self.means.swapaxes(0, 1)) @ np.linalg.inv(factors_KDD).swapaxes(1, 2)
        log_det_K = np.log(np.diagonal(factors_KDD, axis1=1, axis2=2)).sum(1)
        log_KN = -0.5 * (white_KND**2).sum(-1) - log_det_K[:, None] - 0.5 * D * LOG_2PI
        return normalize(log_KN + safe_log(self.weights).T)[1]

    def sample(self, random_state: Any = None) -> Floats:
        """One draw from each mixture, (N, D)."""
        rng = random_numbers(random_state)
        N, K, D = self.means.shape
        edges_NK = np.cumsum(self.weights, 1)
        component_N = (rng.uniform(size=(N, 1)) * edges_NK[:, -1:] > edges_NK).sum(1).clip(max=K - 1)
        noise_ND = np.einsum("nij,nj->ni", cholesky_factors(self.covariances)[component_N], rng.normal(size=(N, D)))
        return self.means[np.arange(N), component_N] + noise_ND
