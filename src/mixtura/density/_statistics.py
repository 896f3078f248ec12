"""Sufficient statistics of an expectation step; those of parts add up to those of the whole.

D columns, K components. Moments are about a reference point of each component, so that nothing cancels where data lie
far from the origin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Statistics:
    """Weighted counts and moments under the responsibilities of one expectation step.

    Attributes:
        count_K: sum of responsibilities.
        first_KD: sum of responsibility * (x - reference).
        second: sum of responsibility * (x - reference)(x - reference).T, (K, D, D), or its diagonal (K, D); or pooled,
            (1, D, D), the sum of that over the components.
        reference_KD: the points that moments are about.
        log_likelihood: sum over rows of the log density, weighted, under the parameters of the step.
        weight: sum of row weights.
        noise: sum of responsibilities of the noise component.
    """

    count_K: Floats
    first_KD: Floats
    second: Floats
    reference_KD: Floats
    log_likelihood: float = 0.0
    weight: float = 0.0
    noise: float = 0.0

    @property
    def mean_log_likelihood(self) -> float:
        """Log likelihood per unit of weight."""
        return self.log_likelihood / self.weight

    @property
    def pooled(self) -> bool:
        """Whether second moments are those of all components together."""
        return len(self.second) < len(self.count_K)

    def pool(self, second: Floats) -> Floats:
        """Second moments of each component, as this has them: summed if it is pooled."""
        return second.sum(0, keepdims=True) if self.pooled else second

    def about(self, reference_KD: Floats) -> Statistics:
        """The same statistics about other points."""
        shift_KD = self.reference_KD - reference_KD
        first_KD = self.first_KD + self.count_K[:, None] * shift_KD
        cross = outer(self.first_KD, shift_KD, self.second.ndim)
        turned = cross if cross.ndim == 2 else cross.swapaxes(1, 2)
        moved = cross + turned + outer(self.count_K[:, None] * shift_KD, shift_KD, self.second.ndim)
        second = self.second + self.pool(moved)
        return replace(self, first_KD=first_KD, second=second, reference_KD=reference_KD)

    def __add__(self, other: Statistics) -> Statistics:
        other = other.about(self.reference_KD)
        return Statistics(
            self.count_K + other.count_K,
            self.first_KD + other.first_KD,
            other.pool(self.second) + self.pool(other.second),
            self.reference_KD,
            self.log_likelihood + other.log_likelihood,
            self.weight + other.weight,
            self.noise + other.noise,
        )

    def __mul__(self, factor: float) -> Statistics:
        return Statistics(
            self.count_K * factor,
            self.first_KD * factor,
            self.second * factor,
            self.reference_KD,
            self.log_likelihood * factor,
            self.weight * factor,
            self.noise * factor,
        )


def outer(x_KD: Floats, y_KD: Floats, ndim: int) -> Floats:
    """x y.T of each row, (K, D, D), or its diagonal (K, D) when ``ndim`` is 2."""
    return x_KD * y_KD if ndim == 2 else x_KD[:, :, None] * y_KD[:, None]


def empty_statistics(reference_KD: Floats, *, diagonal: bool) -> Statistics:
    """Zeros, to add to."""
    K, D = reference_KD.shape
    return Statistics(np.zeros(K), np.zeros((K, D)), np.zeros((K, D) if diagonal else (K, D, D)), reference_KD)
