"""How many groups there are, found by splitting and merging; rows whose class is known stay together.

Category discovery: of some rows the class is known, the others may be of a known class or of a new one, and how many
new ones there are is not known either. A mixture starts with a guess of the number and alternates, until nothing moves,

    EM              with a normal-inverse-Wishart prior, labelled rows fixed to the component of their class
    split           each component into two, accepted with probability min(1, H)
    merge           pairs, accepted with probability min(1, 1 / H)

where H compares marginal likelihoods, parameters integrated out (``mixtura.density._partition``), so that a component
that is not needed costs. Of all partitions that came by, the most probable one is kept and its mixture fitted.

The prior's ``psi`` says how wide a group is expected to be, and with it how fine the division is. Groups are Gaussian
in the columns as they are: features of a network should be scaled to length 1 first, as in the paper.

Where the paper and its code differ from this: the code accepts a split or merge in 10 % of the rounds whatever H is,
and its merges leave the merged components in place; this follows the formulas. In the paper a component with labelled
rows neither splits nor merges, so that a class that has swallowed others at the start keeps them; here its unlabelled
rows may leave, and unlabelled components may join it. Learning features in turn with the mixture (the paper's
contrastive step) is left to the user.

N rows, D columns, K components.

Source: Zhao, Wen and Han, Learning semi-supervised Gaussian mixture models for generalized category discovery,
arXiv:2305.06144; its moves are those of Ronen, Finder and Freifeld, arXiv:2203.14309.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from mixtura.core.errors import OptionError
from mixtura.density import _init
from mixtura.density._checks import check_number, check_prior, check_rows, check_whole_number, random_numbers
from mixtura.density._em import data_moments
from mixtura.density._labels import check_labels
from mixtura.density._partition import Judge, Partition, merge, settle, split
from mixtura.density._rows import Rows
from mixtura.density._tables import as_table
from mixtura.density.gaussian_mixture import GaussianMixture
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
PATIENCE = 4  # rounds without a better partition
WIDTH = 0.1  # expected variance of a group, of that of all rows


class SplitMergeMixture(ClusterMixin, BaseEstimator):
    """A Gaussian mixture that finds its number of components, and respects labels of some rows.

    Args:
        n_components_init: components to start with, at least as many as known classes; None for one more than those.
        alpha: concentration of the Dirichlet process: larger values favor more components, slowly.
        prior: ``NIW`` of every component; None for kappa 0.01, nu D + 2 and a diagonal psi of a tenth of the variances.
        min_rows: components of no more rows are not split.
        n_init: starts, of which the most probable partition is kept.
        max_iter: rounds of a start at most.
        tol: of the mean log likelihood, where the last EM ends.
        random_state: seed or ``RandomState`` of starts and moves.

    Attributes:
        mixture_: the fitted ``GaussianMixture``; its components are in the order of ``classes_``.
        classes_: label of each component, (K,): known labels in their order, then new numbers after the largest.
        n_components_: K.
        labels_: label of each row given to ``fit``; rows of weight 0 are only predicted.
        log_joint_: log probability of the best partition and the rows, up to a constant.
        sizes_: numbers of components after each round of the best start.
        n_iter_: how many rounds that were.
        converged_: whether they ended because nothing better came.
        n_features_in_: D.
    """

    batch_size = None

    def __init__(
        self,
        n_components_init: int | None = None,
        *,
        alpha: float = 1.0,
        prior: NIW | None = None,
        min_rows: int = 5,
        n_init: int = 1,
        max_iter: int = 50,
        tol: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.n_components_init = n_components_init
        self.alpha = alpha
        self.prior = prior
        self.min_rows = min_rows
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Find components.

        Args:
            X: (N, D), without missing values.
            y: class of each row, a whole number from 0, -1 where unknown; numbers may have gaps.
            sample_weight: (N,); a row of weight 2 counts as two rows, one of weight 0 is left out.

        Raises:
            OptionError, ShapeError: naming the argument.
        """
        self._check_options()
        data_ND = validate_data(self, as_table(X), dtype=[np.float64, np.float32])
        rows, known = self._rows(X, y, sample_weight)
        K = self._first_size(len(known), rows)
        judge = Judge(rows, self._resolve_prior(rows), float(self.alpha), float(self.min_rows))
        rng = random_numbers(self.random_state)
        found = [self._search(judge, K, rng) for _ in range(self.n_init)]
        best, self.log_joint_, self.sizes_, self.converged_ = max(found, key=lambda one: one[1])
        self.n_iter_, self.n_components_ = len(self.sizes_), best.K
        self.mixture_ = GaussianMixture(
            best.K, prior=judge.prior, init=best.groups_N, max_iter=1000, tol=self.tol, reg_covar=0
        )
        self.mixture_.fit(rows.data_ND, labels=rows.labels, sample_weight=rows.weights_N)
        after = int(known[-1]) + 1 if len(known) else 0
        self.classes_ = np.concatenate([known, after + np.arange(best.K - len(known))]).astype(np.intp)
        self.labels_ = self.classes_[self.mixture_.predict(data_ND)]
        if rows.labels is not None:
            at = np.arange(len(data_ND)) if rows.kept_N is None else np.flatnonzero(rows.kept_N)
            given = rows.labels >= 0
            self.labels_[at[given]] = known[rows.labels[given]]
        return self

    def predict(self, X: Any) -> NDArray[np.intp]:
        """The most probable class of each row, (N,)."""
        data_ND = self._checked(X)
        return self.classes_[self.mixture_.predict(data_ND)]

    def predict_proba(self, X: Any) -> Floats:
        """Probability of each of ``classes_`` given the row, (N, K)."""
        data_ND = self._checked(X)
        return self.mixture_.predict_proba(data_ND)

    def score_samples(self, X: Any) -> Floats:
        """Log density of each row, (N,)."""
        data_ND = self._checked(X)
        return self.mixture_.score_samples(data_ND)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log density of the rows, weighted."""
        data_ND = self._checked(X)
        return self.mixture_.score(data_ND, sample_weight=sample_weight)

    def _checked(self, X: Any) -> Floats:
        check_is_fitted(self)
        return validate_data(self, as_table(X), dtype=[np.float64, np.float32], reset=False)

    def _check_options(self) -> None:
        check_whole_number("n_init", self.n_init, 1)
        check_whole_number("max_iter", self.max_iter, 1)
        check_whole_number("min_rows", self.min_rows, 0)
        check_number("tol", self.tol, 0)
        check_prior(self.prior)
        check_number("alpha", self.alpha, np.finfo(float).tiny)
        if self.n_components_init is not None:
            check_whole_number("n_components_init", self.n_components_init, 1)

    def _rows(self, X: Any, y: Any, sample_weight: Any) -> tuple[Rows, NDArray[np.intp]]:
        """Rows whose labels are 0, 1, ... in the order of the known classes, and those classes."""
        rows = check_rows(self, X, sample_weight, K=1, reset=False)
        labels = check_labels(y, rows.N if rows.kept_N is None else len(rows.kept_N), None, "y")
        if labels is None:
            return rows, np.empty(0, np.intp)
        labels = labels if rows.kept_N is None else labels[rows.kept_N]
        known = np.unique(labels[labels >= 0])
        codes_N = np.where(labels >= 0, np.searchsorted(known, labels), -1)
        return dataclasses.replace(rows, labels=codes_N if len(known) else None), known

    def _first_size(self, n_known: int, rows: Rows) -> int:
        K = n_known + 1 if self.n_components_init is None else self.n_components_init
        if n_known > K:
            raise OptionError(f"n_components_init={K} is less than the {n_known} classes in y")
        return min(K, len(np.unique(rows.data_ND, axis=0)))

    def _resolve_prior(self, rows: Rows) -> NIW:
        mean_D, covariance_DD = data_moments(rows)
        if self.prior is None:
            variances_D = np.diag(covariance_DD)
            level = variances_D.mean() if variances_D.any() else 1.0
            default = NIW(psi=np.diag(WIDTH * np.where(variances_D > 0, variances_D, level)))
            return default.resolve(mean_D, covariance_DD, 1)
        prior = self.prior.resolve(mean_D, covariance_DD, 1)
        if not prior.kappa > 0:
            raise OptionError(f"prior needs kappa > 0 here, got {prior.kappa!r}")
        return prior

    def _search(self, judge: Judge, K: int, rng: np.random.RandomState) -> tuple[Partition, float, list[int], bool]:
        """The best partition of one start, its log probability, numbers of components by round, whether it ended."""
        best = now = settle(judge, Partition(_init.start("kmeans", judge.rows, K, rng), K))
        most, sizes, stale = judge.log_joint(best), [], 0
        while stale < PATIENCE and len(sizes) < self.max_iter:
            now = settle(judge, merge(judge, split(judge, now, rng), rng))
            sizes.append(now.K)
            value, stale = judge.log_joint(now), stale + 1
            if value > most + 1e-9 * abs(most):
                best, most, stale = now, value, 0
        return best, most, sizes, stale == PATIENCE
