"""What a fitted mixture can be asked: criteria, samples, marginals, conditionals, missing values.

N rows, D columns, K components; G given columns, R columns that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._base import MixtureBase
from mixtura.density._checks import check_whole_number, random_numbers
from mixtura.density._em import normalize
from mixtura.density._hidden import patterns
from mixtura.density._parameters import LOG_2PI, Parameters, cholesky_factors, safe_log
from mixtura.density._tables import as_numpy, check_table
from mixtura.density.batch import GaussianMixtureBatch
from mixtura.density.constraints import check_constraints
from mixtura.density.families import find_family
from mixtura.density.links import Link

if TYPE_CHECKING:
    from mixtura.density.gaussian_mixture import GaussianMixture

Floats = NDArray[np.floating]


class Queries(MixtureBase):
    """Questions to a fitted mixture."""

    covariance: str
    constraints: Any
    random_state: Any

    @property
    def n_parameters_(self) -> int:
        """Free parameters; with a noise component its weight and its volume count, as in mclust."""
        K, D = self.means_.shape
        family = find_family(self.covariance)
        own = [one for one in check_constraints(self.constraints, K, D) if not isinstance(one, Link)]
        removed = sum(constraint.n_removed(K, D, family) for constraint in own)
        noise = 0 if self.noise_log_density_ is None else 2
        return K - 1 + K * D + family.n_parameters(K, D) + noise - removed

    def bic(self, X: Any, sample_weight: Any = None) -> float:
        """Bayesian information criterion, -2 log L + parameters * log(sum of weights); lower is better.

        mclust's BIC is the negative.
        """
        total, weight = self._total_log_likelihood(X, sample_weight)
        return -2 * total + self.n_parameters_ * float(np.log(weight))

    def aic(self, X: Any, sample_weight: Any = None) -> float:
        """Akaike information criterion, -2 log L + 2 * parameters; lower is better."""
        return -2 * self._total_log_likelihood(X, sample_weight)[0] + 2 * self.n_parameters_

    def icl(self, X: Any, sample_weight: Any = None) -> float:
        """Integrated completed likelihood: BIC less twice the log probability of each row's component."""
        bic = self.bic(X, sample_weight)
        certainty_N = np.log(self.predict_proba(X).max(1).astype(np.float64))
        weights_N = np.ones(len(certainty_N)) if sample_weight is None else np.asarray(as_numpy(sample_weight), float)
        return bic - 2 * float(weights_N @ certainty_N)

    def sample(self, n_samples: int = 1) -> tuple[Floats, NDArray[np.intp]]:
        """Draw rows, and the component of each, in the order of components.

        Raises:
            OptionError: if there is a noise component: its region is not kept.
        """
        check_is_fitted(self)
        check_whole_number("n_samples", n_samples, 1)
        if self.noise_log_density_ is not None:
            raise OptionError("a mixture with a noise component cannot be sampled")
        rng = random_numbers(self.random_state)
        counts_K = rng.multinomial(n_samples, self.weights_ / self.weights_.sum())
        component_N = np.repeat(np.arange(len(counts_K)), counts_K)
        factors_KDD = cholesky_factors(self.covariances_)
        draws_ND = rng.normal(size=(n_samples, self.means_.shape[1]))
        return self.means_[component_N] + np.einsum("nij,nj->ni", factors_KDD[component_N], draws_ND), component_N

    def marginal(self, columns: Sequence[int]) -> GaussianMixture:
        """The mixture of some of the columns, in the order given.

        Raises:
            OptionError: if there is a noise component, no column, or one that does not exist or comes twice.
        """
        from mixtura.density.gaussian_mixture import GaussianMixture

        check_is_fitted(self)
        if self.noise_log_density_ is not None:
            raise OptionError("a mixture with a noise component has no marginal")
        index = check_columns("columns", columns, self.means_.shape[1])
        if not len(index):
            raise OptionError("columns must name at least one, got none")
        covariances = self._covariances[:, index]
        covariances = covariances if covariances.ndim == 2 else covariances[:, :, index]
        family = marginal_family(self.covariance)
        return GaussianMixture.from_parameters(self.weights_, self.means_[:, index], covariances, covariance=family)

    def conditional(self, X_given: Any, given: Sequence[int]) -> GaussianMixtureBatch:
        """What the mixture says of the other columns, once some are known.

        Args:
            X_given: (N, G) values of the given columns.
            given: their indices.

        Returns:
            A mixture for each row, of the remaining columns in their order.

        Raises:
            OptionError: if there is a noise component, a column does not exist, or none remains.
            ShapeError: if X_given has another width.
        """
        check_is_fitted(self)
        if self.noise_log_density_ is not None:
            raise OptionError("a mixture with a noise component has no conditional")
        g = check_columns("given", given, self.means_.shape[1])
        if len(g) == self.means_.shape[1]:
            raise OptionError(f"given must leave a column to ask for, got all {len(g)}")
        X_given = np.asarray(as_numpy(X_given), dtype=float)
        if X_given.ndim != 2 or X_given.shape[1] != len(g):
            raise ShapeError(f"X_given must be (N, {len(g)}), got {X_given.shape}")
        if not np.isfinite(X_given).all():
            raise OptionError("X_given must be finite; for missing values use impute")
        return conditional_of(self.parameters_, X_given, g)

    def impute(self, X: Any, how: str = "mean", random_state: Any = None) -> Floats:
        """Rows with their missing values filled in.

        Args:
            X: (N, D) with NaN where a value is missing.
            how: "mean" for the conditional mean given what was observed, "sample" for a draw from the conditional.
            random_state: of the draws.
        """
        check_is_fitted(self)
        if how not in ("mean", "sample"):
            raise OptionError(f"how must be 'mean' or 'sample', got {how!r}")
        rng = random_numbers(random_state)
        data_ND = np.array(check_table(self, X, reset=False))
        for observed_D, index in patterns(data_ND):
            if not observed_D.all():
                g = np.flatnonzero(observed_D)
                batch = self.conditional(data_ND[np.ix_(index, g)], g.tolist())
                filled = batch.mean() if how == "mean" else batch.sample(rng)
                data_ND[np.ix_(index, np.flatnonzero(~observed_D))] = filled
        return data_ND


def marginal_family(name: str) -> str:
    """The family that holds any marginal of a family; shapes and orientations are not kept by columns left out."""
    family = find_family(name)
    if not family.diagonal:
        return "EEE" if family.name == "EEE" else "VVV"
    return family.name if family.name in ("EII", "VII", "EEI") else "VVI"


def check_columns(name: str, columns: Sequence[int], D: int) -> NDArray[np.intp]:
    """Distinct indices of columns.

    Raises:
        OptionError: if one does not exist or comes twice.
    """
    index = np.asarray(columns)
    index = index if index.size else index.astype(int)
    if index.ndim != 1 or index.dtype.kind not in "iu" or (index < 0).any() or (index >= D).any():
        raise OptionError(f"{name} must be indices of columns in 0 .. {D - 1}, got {columns!r}")
    if len(np.unique(index)) < len(index):
        raise OptionError(f"{name} must not name a column twice, got {columns!r}")
    return index.astype(np.intp)


def conditional_of(parameters: Parameters, x_NG: Floats, g: NDArray[np.intp]) -> GaussianMixtureBatch:
    """The conditional of the columns that are not in ``g``."""
    r = np.setdiff1d(np.arange(parameters.means_KD.shape[1]), g)
    full_KDD, means_KD = parameters.full, parameters.means_KD
    block = full_KDD[:, g[:, None], g]
    difference_KNG = x_NG - means_KD[:, None, g]
    factors = cholesky_factors(block)
    white_KNG = difference_KNG @ np.linalg.inv(factors).swapaxes(1, 2)
    log_det_K = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    log_KN = -0.5 * (white_KNG**2).sum(-1) - (log_det_K + 0.5 * len(g) * LOG_2PI)[:, None]
    shares_KN, _ = normalize(log_KN + safe_log(parameters.weights_K)[:, None])
    side_KGR = full_KDD[:, g[:, None], r]
    gain_KGR = np.linalg.solve(block, side_KGR)
    means_KNR = means_KD[:, None, r] + difference_KNG @ gain_KGR
    covariances = full_KDD[:, r[:, None], r] - side_KGR.swapaxes(1, 2) @ gain_KGR
    return GaussianMixtureBatch(shares_KN.T, means_KNR.swapaxes(0, 1), 0.5 * (covariances + covariances.swapaxes(1, 2)))
