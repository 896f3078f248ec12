"""Gaussian mixtures by expectation and maximization. N rows, D columns, K components."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError
from mixtura.density import _init
from mixtura.density._checks import check_flag, check_number
from mixtura.density._em import Fit, data_moments, expectation, fill_means, moments_of, threads
from mixtura.density._exchange import Exchange
from mixtura.density._files import SavedMixture
from mixtura.density._fitting import Fitting
from mixtura.density._maximize import Model, maximize
from mixtura.density._noise import FIRST_WEIGHT, log_uniform_density
from mixtura.density._parameters import Parameters, safe_log, scores_of
from mixtura.density._queries import Queries
from mixtura.density._rows import Rows
from mixtura.density._statistics import Statistics
from mixtura.density.constraints import check_constraints
from mixtura.density.families import find_family
from mixtura.density.links import Link, find_links
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]


class GaussianMixture(Queries, Exchange, SavedMixture, Fitting):
    """A mixture of Gaussians: 14 covariance families, row weights, missing values, partial labels, priors, constraints.

    Args:
        n_components: K.
        covariance: one of mclust's 14 families ("EII" ... "VVV": volume, shape and orientation are Equal, Variable or
            the Identity), or scikit-learn's "full" (VVV), "tied" (EEE), "diag" (VVI), "spherical" (VII).
        reg_covar: added to the diagonal of covariances, in squared units of the data; a number, or one for each column,
            (D,). A warning says where it is not small against the variance of a column.
        prior: ``NIW`` on means and covariances, or None for maximum likelihood.
        init: "kmeans", "whitened-kmeans", "hierarchical", "random", or responsibilities (N, K) or components (N,); with
            a noise component also (N, K + 1), its own last.
        n_init: starts, of which the likeliest result is kept.
        max_iter: iterations at most; 0 gives the start, of which ``lower_bound_`` is -inf.
        tol: of the mean log likelihood, where iteration ends.
        weight_concentration: of a Dirichlet prior on the weights, at least 1, or None for maximum likelihood.
        noise_component: whether one more component is uniform over the region of the data; rows of it are -1.
        constraints: one or several objects of ``mixtura.density.constraints`` and ``mixtura.density.links``.
        algorithm: "gemm" for two matrix products a step, "cholesky" for one factor after the other, "auto" for the
            faster one that keeps enough digits.
        batch_size: rows worked on at once, or None for what fits a core's cache; it changes speed, not results.
        n_jobs: threads of the expectation step, as in joblib; None for as many as linear algebra would use
            (OMP_NUM_THREADS). Results do not depend on it.
        random_state: seed or ``RandomState`` of the start.
        warm_start: whether ``fit`` goes on from the parameters that are there.

    Attributes:
        weights_: (K,)
        means_: (K, D)
        covariances_: (K, D, D)
        n_iter_: iterations of the best start.
        converged_: whether they ended by ``tol``.
        lower_bound_: mean log likelihood of a row in the last expectation step, plus the log prior per row.
        lower_bounds_: the same of every iteration.
        noise_weight_: weight of the noise component, 0 without one.
        noise_log_density_: its log density, None without one.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance: str = "VVV",
        reg_covar: Any = 1e-6,
        prior: NIW | None = None,
        init: Any = "kmeans",
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-3,
        weight_concentration: float | None = None,
        noise_component: bool = False,
        constraints: Any = None,
        algorithm: str = "auto",
        batch_size: int | None = None,
        n_jobs: int | None = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.reg_covar = reg_covar
        self.prior = prior
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.weight_concentration = weight_concentration
        self.noise_component = noise_component
        self.constraints = constraints
        self.algorithm = algorithm
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.warm_start = warm_start

    def _check_options(self) -> int:
        check_flag("noise_component", self.noise_component)
        if self.weight_concentration is not None:
            check_number("weight_concentration", self.weight_concentration, 1)
        return super()._check_options()

    def _resolve_prior(self, rows: Rows) -> NIW | None:
        return None if self.prior is None else self.prior.resolve(*data_moments(rows), self.n_components)

    def _describe_rows(self, rows: Rows) -> None:
        self.noise_log_density_ = log_uniform_density(rows) if self.noise_component else None

    def _model(self, rows: Rows, prior: NIW | None) -> Model:
        constraints = check_constraints(self.constraints, self.n_components, rows.D)
        self._links = find_links(constraints, rows.N)
        hidden = self.noise_component or rows.incomplete or rows.noise is not None or rows.kept_N is not None
        if self._links is not None and hidden:
            raise OptionError("links of rows go with no noise_component, missing values, noise_cov, or weights of 0")
        on_parameters = [constraint for constraint in constraints if not isinstance(constraint, Link)]
        family = find_family(self.covariance)
        return Model(family, self.reg_covar, prior, self.weight_concentration, on_parameters)

    def _warm(self, rows: Rows) -> Parameters:
        self._check_same_shape(rows)
        diagonal = find_family(self.covariance).diagonal
        covariances = np.diagonal(self.covariances_, 0, 1, 2) if diagonal else self.covariances_
        noise_weight = self.noise_weight_ or (FIRST_WEIGHT if self.noise_component else 0.0)
        weights_K = self.weights_ / self.weights_.sum() * (1 - noise_weight)
        return Parameters(weights_K, self.means_, covariances, noise_weight)

    def _check_stream(self) -> None:
        links = [one for one in check_constraints(self.constraints) if isinstance(one, Link)]
        if links:
            raise OptionError(
                f"constraints of rows, as {type(links[0]).__name__}, do not go with partial_fit: the rows that they "
                "number would be others in every batch"
            )

    def _start(self, rows: Rows, model: Model, rng: np.random.RandomState) -> Parameters:
        K, noise_weight, init = self.n_components, 0.0, self.init
        if self.noise_component:
            noise_weight = FIRST_WEIGHT
            if not isinstance(init, str) and np.shape(init)[1:] == (K + 1,):
                given = _init.given_responsibilities(init, rows, K + 1)
                init, noise_weight = given[:, :K], float(given[:, K].mean())
        given = init if noise_weight != FIRST_WEIGHT and self.noise_component else _init.start(init, rows, K, rng)
        statistics = moments_of(fill_means(rows), given, K, diagonal=model.family.diagonal)
        parameters = maximize(statistics, model)
        return parameters.with_(weights_K=parameters.weights_K * (1 - noise_weight), noise_weight=noise_weight)

    def _expectation(self, rows: Rows, model: Model, parameters: Parameters) -> Statistics:
        log_noise = None
        if self.noise_log_density_ is not None:
            log_noise = float(self.noise_log_density_ + safe_log(np.float64(parameters.noise_weight)))
        links = self._links and partial(self._links.adjust, log_weights_K=safe_log(parameters.weights_K))
        scores = scores_of(parameters)
        plain = not model.constraints and links is None and log_noise is None
        pooled = plain and model.family.name == "EEE" and len(parameters.weights_K) > 1
        return expectation(
            rows,
            scores,
            algorithm=self.algorithm,
            log_noise=log_noise,
            links=links,
            pooled=pooled,
            n_jobs=threads(self.n_jobs),
        )

    def _maximize(self, statistics: Statistics, model: Model, previous: Parameters) -> Parameters:
        return maximize(statistics, model, previous)

    def _bound(self, model: Model, statistics: Statistics, parameters: Parameters) -> float:
        extra = 0.0 if model.prior is None else model.prior.log_density(parameters)
        if model.weight_concentration is not None:
            extra += (model.weight_concentration - 1) * float(safe_log(parameters.weights_K).sum())
        return statistics.mean_log_likelihood + extra / statistics.weight

    def _climb(self, rows: Rows, model: Model, start: Parameters) -> Fit:
        fit = super()._climb(rows, model, start)
        scores_of(fit.parameters)  # a component that collapsed in the last step is named here
        return fit

    _state_type = Parameters

    @property
    def _state(self) -> Parameters:
        return self.parameters_

    def _set_state(self, parameters: Parameters) -> None:
        self.weights_, self.means_ = parameters.weights_K, parameters.means_KD
        self._covariances, self.noise_weight_ = parameters.covariances, parameters.noise_weight
        self.n_features_in_ = parameters.means_KD.shape[1]
