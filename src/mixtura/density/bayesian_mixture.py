"""Bayesian Gaussian mixtures by variational inference. N rows, D columns, K components."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError
from mixtura.density import _init
from mixtura.density._checks import check_number
from mixtura.density._em import data_moments, expectation, fill_means, moments_of, threads
from mixtura.density._files import SavedMixture
from mixtura.density._fitting import Fitting
from mixtura.density._parameters import Scores, cholesky_factors
from mixtura.density._queries import Queries
from mixtura.density._rows import Rows
from mixtura.density._statistics import Statistics
from mixtura.density._variational import (
    CONJUGATE,
    Posterior,
    VariationalModel,
    believe,
    divergence,
    expected_scores,
    expected_weights,
)
from mixtura.density.errors import SingularComponentError
from mixtura.density.families import find_family
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
WEIGHTS = ("process", "dirichlet")


class BayesianGaussianMixture(Queries, SavedMixture, Fitting):
    """A Gaussian mixture with a posterior over its parameters; components that the data do not need stay empty.

    Rows may have weights, missing values, labels and noise as in ``GaussianMixture``, and come as a stream.

    Args:
        n_components: K, the most components that may be used.
        covariance: a family with a conjugate prior: "EII", "VII", "EEI", "VVI", "EEE", "VVV", or scikit-learn's
            "full", "tied", "diag", "spherical".
        weights: "process" for a Dirichlet process (sticks, of which earlier components are expected to be longer; the
            data may say otherwise, and components are not sorted), "dirichlet" for a Dirichlet distribution.
        weight_concentration: of it, in rows; small values leave more components empty; None for 1 / K.
        prior: ``NIW``; None for kappa 1, nu D, and mean and covariance of the data, as in scikit-learn.
        reg_covar: as in ``GaussianMixture``.
        init: as in ``GaussianMixture``.
        n_init: starts, of which the one with the highest bound is kept.
        max_iter: iterations at most; 0 gives the start, of which ``lower_bound_`` is -inf.
        tol: of the lower bound per row, where iteration ends.
        algorithm: as in ``GaussianMixture``.
        batch_size: as in ``GaussianMixture``.
        n_jobs: threads of the expectation step, as in joblib; None for as many as linear algebra would use
            (OMP_NUM_THREADS). Results do not depend on it.
        random_state: seed or ``RandomState`` of the start.
        warm_start: whether ``fit`` goes on from the posterior that is there.

    Attributes:
        weights_: expected weights, (K,).
        means_: expected means, (K, D).
        covariances_: inverses of the expected precisions, (K, D, D).
        posterior_: the whole posterior.
        lower_bound_: bound of the log evidence, per unit of weight; with ``reg_covar`` above 0 nearly so.
        lower_bounds_: the same of every iteration.
        n_iter_: iterations of the best start.
        converged_: whether they ended by ``tol``.
        n_features_in_: D.

    ``predict`` and ``predict_proba`` take the expectation over the posterior. Densities, samples, marginals and
    conditionals are those of the mixture of expected parameters, so that they agree with each other.
    """

    noise_log_density_ = None
    noise_weight_ = 0.0
    constraints = None

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance: str = "VVV",
        weights: str = "process",
        weight_concentration: float | None = None,
        prior: NIW | None = None,
        reg_covar: Any = 1e-6,
        init: Any = "kmeans",
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-3,
        algorithm: str = "auto",
        batch_size: int | None = None,
        n_jobs: int | None = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.weights = weights
        self.weight_concentration = weight_concentration
        self.prior = prior
        self.reg_covar = reg_covar
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.algorithm = algorithm
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.warm_start = warm_start

    def _check_options(self) -> int:
        if self.weights not in WEIGHTS:
            raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.weight_concentration is not None:
            check_number("weight_concentration", self.weight_concentration, np.finfo(float).tiny)
        if find_family(self.covariance).name not in CONJUGATE:
            raise OptionError(f"covariance needs a conjugate prior: {', '.join(CONJUGATE)}, got {self.covariance!r}")
        return super()._check_options()

    def _resolve_prior(self, rows: Rows) -> NIW:
        mean_D, covariance_DD = data_moments(rows)
        prior = self.prior or NIW(kappa=1.0, nu=float(len(mean_D)), psi=covariance_DD, mean=mean_D)
        if self.prior is not None:
            prior = prior.resolve(mean_D, covariance_DD, self.n_components)
            if not prior.kappa > 0:
                raise OptionError(f"prior needs kappa > 0 here, got {prior.kappa!r}")
        try:
            cholesky_factors(prior.psi[None])
        except SingularComponentError:
            prior = replace(prior, psi=prior.psi + self.reg_covar * np.eye(len(mean_D)))
            cholesky_factors(prior.psi[None])
        return prior

    def _model(self, rows: Rows, prior: NIW | None) -> VariationalModel:
        concentration = 1 / self.n_components if self.weight_concentration is None else self.weight_concentration
        return VariationalModel(find_family(self.covariance), prior, self.weights, concentration, self.reg_covar)

    def _warm(self, rows: Rows) -> Posterior:
        self._check_same_shape(rows)
        self._check_same_form(None)
        return self.posterior_

    def _start(self, rows: Rows, model: VariationalModel, rng: np.random.RandomState) -> Posterior:
        given = _init.start(self.init, rows, self.n_components, rng)
        return believe(moments_of(fill_means(rows), given, self.n_components, diagonal=model.family.diagonal), model)

    def _expectation(self, rows: Rows, model: VariationalModel, posterior: Posterior) -> Statistics:
        return expectation(
            rows, expected_scores(posterior, model.family), algorithm=self.algorithm, n_jobs=threads(self.n_jobs)
        )

    def _maximize(self, statistics: Statistics, model: VariationalModel, previous: Posterior) -> Posterior:
        return believe(statistics, model)

    def _bound(self, model: VariationalModel, statistics: Statistics, posterior: Posterior) -> float:
        return (statistics.log_likelihood - divergence(posterior, model)) / statistics.weight

    def _check_same_form(self, kept: Statistics | None) -> None:
        super()._check_same_form(kept)
        if len(self.posterior_.sticks) != (2 if self.weights == "process" else 1):
            raise OptionError(f"weights={self.weights!r} cannot go on from the other kind; fit a new mixture")

    def _check_state(self) -> None:
        super()._check_state()
        self._check_same_form(None)

    _state_type = Posterior

    @property
    def _state(self) -> Posterior:
        return self.posterior_

    def _set_state(self, posterior: Posterior) -> None:
        self.posterior_, self._covariances = posterior, posterior.covariances
        self.weights_, self.means_ = expected_weights(posterior), posterior.means_KD
        self.n_features_in_ = posterior.means_KD.shape[1]

    def _scores(self) -> Scores:
        return expected_scores(self.posterior_, find_family(self.covariance))
