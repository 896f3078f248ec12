"""Constraints on a mixture: each is one object whose ``project`` follows the maximization step.

``exact`` says whether the likelihood still never falls: whether the projection is the constrained maximum.
K components, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._maximize import MaximizationStep
from mixtura.density._parameters import Parameters, full_covariances
from mixtura.density.families import Family

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Constraint:
    """Base of the constraints on parameters."""

    stage: ClassVar[int] = 0

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """Parameters that keep the constraint, given those that the step found without it."""
        raise NotImplementedError

    def exact(self, family: Family) -> bool:
        """Whether the projection is the maximum under the constraint, so that the likelihood never falls."""
        return True

    def n_removed(self, K: int, D: int, family: Family) -> int:
        """Free parameters that the constraint takes away."""
        return 0

    def check(self, K: int, D: int) -> None:
        """Raise ``OptionError`` or ``ShapeError`` unless the constraint suits K components of D columns."""


@dataclass(frozen=True, eq=False)
class TiedWeights(Constraint):
    """All components have the same weight."""

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """Equal weights, that sum to what the components had."""
        weights_K = parameters.weights_K
        return parameters.with_(weights_K=np.full_like(weights_K, weights_K.sum() / len(weights_K)))

    def n_removed(self, K: int, D: int, family: Family) -> int:
        """K - 1."""
        return K - 1


@dataclass(frozen=True, eq=False)
class MinWeight(Constraint):
    """No component has less weight than ``minimum``; the others share the rest in proportion."""

    minimum: float

    def check(self, K: int, D: int) -> None:
        """Between 0 and 1 / K."""
        if not isinstance(self.minimum, int | float | np.number) or not 0 <= self.minimum <= 1 / K:
            raise OptionError(f"MinWeight needs a minimum between 0 and 1/{K}, got {self.minimum!r}")

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """Weights below the minimum rise to it, until none is below."""
        weights_K, total = parameters.weights_K, parameters.weights_K.sum()
        low_K = np.zeros(len(weights_K), bool)
        while True:
            rest = total - low_K.sum() * self.minimum
            out_K = np.where(low_K, self.minimum, weights_K * rest / max(weights_K[~low_K].sum(), 1e-300))
            below_K = ~low_K & (out_K < self.minimum)
            if not below_K.any():
                return parameters.with_(weights_K=out_K)
            low_K |= below_K


@dataclass(frozen=True, eq=False)
class FixedMeans(Constraint):
    """Means that are known, wholly or in some columns.

    Args:
        mask: (K, D), or (K,) for whole means: True where a value is fixed.
        values: (K, D); read where the mask is True.
    """

    mask: Any
    values: Any
    stage: ClassVar[int] = 1

    def _mask(self, K: int, D: int) -> NDArray[np.bool_]:
        mask = np.asarray(self.mask, bool)
        return np.repeat(mask[:, None], D, 1) if mask.shape == (K,) else mask

    def check(self, K: int, D: int) -> None:
        """Shapes (K, D)."""
        if self._mask(K, D).shape != (K, D) or np.shape(self.values) != (K, D):
            raise ShapeError(
                f"FixedMeans needs mask and values of shape ({K}, {D}), "
                f"got {np.shape(self.mask)}, {np.shape(self.values)}"
            )
        if not np.isfinite(np.asarray(self.values, float)[self._mask(K, D)]).all():
            raise OptionError("FixedMeans needs finite values where the mask is True")

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """Fixed values; other columns move by their regression on the fixed ones; covariances about the new means."""
        means_KD = parameters.means_KD.copy()
        scatter_KDD = full_covariances(step.scatter(means_KD))
        for k, fixed_D in enumerate(self._mask(*means_KD.shape)):
            if not fixed_D.any():
                continue
            move_F = np.asarray(self.values, float)[k, fixed_D] - means_KD[k, fixed_D]
            if not fixed_D.all():
                block_FF, side_RF = scatter_KDD[k][np.ix_(fixed_D, fixed_D)], scatter_KDD[k][np.ix_(~fixed_D, fixed_D)]
                means_KD[k, ~fixed_D] += side_RF @ np.linalg.lstsq(block_FF, move_F, rcond=None)[0]
            means_KD[k, fixed_D] = np.asarray(self.values, float)[k, fixed_D]
        return parameters.with_(means_KD=means_KD, covariances=step.covariances(means_KD))

    def exact(self, family: Family) -> bool:
        """Wholly fixed means in any family; single columns in VVV and the diagonal families."""
        mask = np.asarray(self.mask, bool)
        whole = mask.ndim == 1 or bool((mask.all(1) | ~mask.any(1)).all())
        return whole or family.diagonal or family.name == "VVV"

    def n_removed(self, K: int, D: int, family: Family) -> int:
        """As many as values are fixed."""
        return int(self._mask(K, D).sum())


@dataclass(frozen=True, eq=False)
class SharedCovariance(Constraint):
    """Components of one group share their covariance.

    Args:
        groups: (K,) group of each component.
    """

    groups: Any
    stage: ClassVar[int] = 2

    def check(self, K: int, D: int) -> None:
        """One group for each component."""
        if np.shape(self.groups) != (K,):
            raise ShapeError(f"SharedCovariance needs {K} groups, got shape {np.shape(self.groups)}")

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """The family fitted to the pooled scatter of each group."""
        return parameters.with_(covariances=step.covariances(parameters.means_KD, np.asarray(self.groups)))

    def n_removed(self, K: int, D: int, family: Family) -> int:
        """What the family saves with as many components as there are groups."""
        return family.n_parameters(K, D) - family.n_parameters(len(set(np.asarray(self.groups).tolist())), D)


@dataclass(frozen=True, eq=False)
class MaxConditionNumber(Constraint):
    """No covariance has eigenvalues whose ratio exceeds ``limit``.

    The eigenvalues of a component are clipped to [m, limit * m], with the m that is most likely (Won et al., J. R.
    Stat. Soc. B 75, 2013); this is the maximum for VVV and VVI.
    """

    limit: float
    stage: ClassVar[int] = 3

    def check(self, K: int, D: int) -> None:
        """At least 1."""
        if not isinstance(self.limit, int | float | np.number) or not self.limit >= 1:
            raise OptionError(f"MaxConditionNumber needs a limit of at least 1, got {self.limit!r}")

    def project(self, step: MaximizationStep, parameters: Parameters) -> Parameters:
        """Clipped covariances."""
        covariances = parameters.covariances
        if not np.isfinite(covariances).all():
            return parameters
        if covariances.ndim == 2:
            return parameters.with_(
                covariances=np.stack([clip_eigenvalues(one_D, self.limit) for one_D in covariances])
            )
        values_KD, turns_KDD = np.linalg.eigh(covariances)
        clipped_KD = np.stack([clip_eigenvalues(one_D, self.limit) for one_D in values_KD])
        kept_K = (clipped_KD == values_KD).all(1)
        out = (turns_KDD * clipped_KD[:, None]) @ turns_KDD.swapaxes(1, 2)
        return parameters.with_(covariances=np.where(kept_K[:, None, None], covariances, out))

    def exact(self, family: Family) -> bool:
        """VVV and VVI."""
        return family.name in ("VVV", "VVI")


def clip_eigenvalues(values_D: Floats, limit: float) -> Floats:
    """Values clipped to [m, limit * m], where m minimizes  sum(log v + value / v)  of the clipped v."""
    values_D = np.maximum(values_D, 0.0)
    if values_D.max() <= limit * values_D.min() or values_D.max() == 0:
        return values_D
    edges = np.unique(np.concatenate([values_D, values_D / limit]))
    middles = np.concatenate([[edges[0] / 2], (edges[1:] + edges[:-1]) / 2, [edges[-1] * 2]])
    low = values_D < middles[:, None]
    high = values_D > limit * middles[:, None]
    counts = (low | high).sum(1)
    mass = (values_D * low).sum(1) + (values_D * high).sum(1) / limit
    floors = np.unique(np.concatenate([mass[counts > 0] / counts[counts > 0], edges]))
    floors = floors[floors > 0]
    clipped = np.clip(values_D, floors[:, None], limit * floors[:, None])
    return clipped[np.argmin((np.log(clipped) + values_D / clipped).sum(1))]


def check_constraints(constraints: Any, K: int | None = None, D: int | None = None) -> list[Any]:
    """Constraints as a list, each checked; against K and D if these are given.

    Raises:
        OptionError: if something is not a constraint, or does not suit the mixture.
    """
    from mixtura.density.links import Link

    given = (
        []
        if constraints is None
        else [constraints]
        if isinstance(constraints, Constraint | Link)
        else list(constraints)
    )
    for constraint in given:
        if not isinstance(constraint, Constraint | Link):
            raise OptionError(f"constraints must hold objects of mixtura.density.constraints, got {constraint!r}")
        if isinstance(constraint, Constraint) and K is not None and D is not None:
            constraint.check(K, D)
    return given


__all__ = ["FixedMeans", "MaxConditionNumber", "MinWeight", "SharedCovariance", "TiedWeights"]
