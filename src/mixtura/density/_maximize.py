"""The maximization step: from sufficient statistics to parameters. K components, D columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.density._parameters import Parameters
from mixtura.density._statistics import Statistics
from mixtura.density.families import Family, fit_covariances
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
# As in scikit-learn: a component without rows divides by this; by less if the weights of all rows sum to less than 1.
TINY_COUNT = 10 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class Model:
    """What is estimated, and under which prior and constraints.

    Attributes:
        family: of the covariances.
        reg_covar: added to the diagonal of every component's covariance before the family is fitted; a number, or (D,).
        prior: resolved, or None.
        weight_concentration: of a Dirichlet prior on the weights, at least 1, or None for maximum likelihood.
        constraints: applied in the order of their stages.
    """

    family: Family
    reg_covar: Any = 0.0
    prior: NIW | None = None
    weight_concentration: float | None = None
    constraints: Sequence[Any] = ()


@dataclass(frozen=True)
class MaximizationStep:
    """One step, as constraints see it: what was counted, and how covariances follow from means."""

    statistics: Statistics
    model: Model
    previous: Parameters | None = None

    @property
    def count_K(self) -> Floats:
        """Responsibilities of the components, summed."""
        return self.statistics.count_K + TINY_COUNT * min(1.0, self.statistics.weight)

    def weights(self) -> tuple[Floats, float]:
        """Weights of the components, and of the noise."""
        count_K, noise = self.count_K, self.statistics.noise
        if self.model.weight_concentration is not None:
            count_K = count_K + (self.model.weight_concentration - 1)
            noise = noise + (self.model.weight_concentration - 1) * (noise > 0)
        total = count_K.sum() + noise
        return count_K / total, noise / total

    def means(self) -> Floats:
        """Means; shrunk towards the prior's if there is one."""
        statistics, prior = self.statistics, self.model.prior
        if prior is None:
            return statistics.reference_KD + statistics.first_KD / self.count_K[:, None]
        pull_KD = statistics.first_KD + prior.kappa * (prior.mean - statistics.reference_KD)
        return statistics.reference_KD + pull_KD / (self.count_K + prior.kappa)[:, None]

    def scatter(self, means_KD: Floats) -> Floats:
        """Scatter about means, with what the regularization and the prior add to it."""
        statistics = self.statistics.about(means_KD)
        second = statistics.second.copy()
        diagonal_KD = second if second.ndim == 2 else np.einsum("kii->ki", second)
        diagonal_KD += self.model.reg_covar * statistics.pool(self.count_K[:, None])
        prior = self.model.prior
        if prior is None:
            return second
        difference_KD = means_KD - prior.mean
        if second.ndim == 2:
            return second + np.diag(prior.psi) + prior.kappa * difference_KD**2
        own_KDD = prior.psi + prior.kappa * difference_KD[:, :, None] * difference_KD[:, None]
        return second + statistics.pool(own_KDD)

    def covariances(self, means_KD: Floats, groups_K: NDArray[np.intp] | None = None) -> Floats:
        """Covariances of the family about means; components of the same group share one."""
        scatter, count_K = self.scatter(means_KD), self.covariance_count_K
        previous = None if self.previous is None else self.previous.covariances
        if groups_K is None:
            return fit_covariances(self.model.family, scatter, count_K, previous)
        _, first, groups_K = np.unique(groups_K, return_index=True, return_inverse=True)
        member_GK = (groups_K == np.arange(len(first))[:, None]).astype(float)
        pooled = np.tensordot(member_GK, scatter, 1)
        previous = None if previous is None else previous[first]
        return fit_covariances(self.model.family, pooled, member_GK @ count_K, previous)[groups_K]

    @property
    def covariance_count_K(self) -> Floats:
        """Counts that scatter matrices are divided by."""
        prior = self.model.prior
        return self.count_K + (0.0 if prior is None else prior.extra_count)


def maximize(statistics: Statistics, model: Model, previous: Parameters | None = None) -> Parameters:
    """The parameters that are most likely given the statistics."""
    step = MaximizationStep(statistics, model, previous)
    weights_K, noise_weight = step.weights()
    means_KD = step.means()
    parameters = Parameters(weights_K, means_KD, step.covariances(means_KD), noise_weight)
    for constraint in sorted(model.constraints, key=lambda constraint: constraint.stage):
        parameters = constraint.project(step, parameters)
    return parameters
