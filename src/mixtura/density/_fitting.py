"""What fitting is, whatever is fitted: starts, expectation and maximization by turns, and streams.

N rows, D columns, K components. A subclass says what its state is (parameters, or a posterior of them), how statistics
become a state, how a state becomes scores, and which bound rises.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.density._base import MixtureBase
from mixtura.density._checks import (
    check_added,
    check_flag,
    check_number,
    check_prior,
    check_rows,
    check_whole_number,
    random_numbers,
)
from mixtura.density._em import Fit, climb
from mixtura.density._labels import refuse_labels_in_y
from mixtura.density._rows import Rows
from mixtura.density._statistics import Statistics
from mixtura.density._streaming import Stream
from mixtura.density.errors import SingularComponentError
from mixtura.density.families import find_family
from mixtura.density.priors import NIW

ALGORITHMS = ("auto", "gemm", "cholesky")
MUCH = 1e-3  # of a column's variance, to be added to it
Floats = NDArray[np.floating]


class Fitting(MixtureBase):
    """``fit`` and ``partial_fit`` over the hooks of a subclass."""

    n_components: int
    covariance: str
    reg_covar: Any
    prior: NIW | None
    init: Any
    n_init: int
    max_iter: int
    tol: float
    n_jobs: int | None
    random_state: Any
    warm_start: bool
    _stream: Stream

    def _model(self, rows: Rows, prior: NIW | None) -> Any:
        """What is estimated, and under which prior, which is resolved unless it is None."""
        raise NotImplementedError

    def _start(self, rows: Rows, model: Any, rng: np.random.RandomState) -> Any:
        """A state to begin with."""
        raise NotImplementedError

    def _warm(self, rows: Rows) -> Any:
        """The state to go on from."""
        raise NotImplementedError

    def _maximize(self, statistics: Statistics, model: Any, previous: Any) -> Any:
        """The best state given statistics."""
        raise NotImplementedError

    def _expectation(self, rows: Rows, model: Any, state: Any) -> Statistics:
        """Statistics of rows under a state."""
        raise NotImplementedError

    def _bound(self, model: Any, statistics: Statistics, state: Any) -> float:
        """What rises, per unit of weight, given the statistics under a state."""
        raise NotImplementedError

    def _set_state(self, state: Any) -> None:
        raise NotImplementedError

    def _resolve_prior(self, rows: Rows) -> NIW | None:
        raise NotImplementedError

    def _check_stream(self) -> None:
        """Raise ``OptionError`` if options do not suit a stream of batches."""

    def _describe_rows(self, rows: Rows) -> None:
        """Keep what later scores need to know of the rows."""

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, noise_cov: Any = None, *, labels: Any = None
    ) -> Self:
        """Fit by EM.

        Args:
            X: (N, D); NaN where a value is missing at random.
            y: ignored, as scikit-learn's clusterers do: a pipeline passes the target of its last step to every step.
            sample_weight: (N,); a row of weight 2 counts as two rows, one of weight 0 is left out.
            noise_cov: variances (N, D) or covariances (N, D, D) of the known noise of each row (extreme deconvolution).
            labels: components of rows, (N,), -1 where unknown, or probabilities of components (N, K).

        Raises:
            SingularComponentError: if a component collapses.
            OptionError, ShapeError: naming the argument; also if ``y`` holds what labels hold and targets do not: -1
                beside other classes, or probabilities of components.
        """
        K = self._check_options()
        refuse_labels_in_y(y, [K])
        rows = check_rows(self, X, sample_weight, noise_cov, labels=labels, K=K)
        self._check_columns(rows)
        prior = self._resolve_prior(rows)
        model = self._model(rows, prior)
        self._describe_rows(rows)
        rng = random_numbers(self.random_state)
        if self.warm_start and hasattr(self, "weights_"):
            starts = [self._warm(rows)]
        else:
            starts = (self._start(rows, model, rng) for _ in range(self.n_init))
        best = max((self._climb(rows, model, start) for start in starts), key=lambda fit: fit.lower_bound)
        self._keep(best)
        self._stream = Stream(prior).see(best.statistics)
        return self

    def partial_fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, labels: Any = None, forget: float | None = None
    ) -> Self:
        """One expectation and maximization with a batch of a stream, which goes on from what was seen before.

        Args:
            X: (N, D); the first batch of a new mixture also finds the start, and needs at least K rows.
            y: ignored, as in ``fit``.
            sample_weight: as in ``fit``.
            labels: as in ``fit``.
            forget: between 0 and 1: the step does not fall below it, so that old batches fade and drift is followed;
                None for steps that go to 0.

        Raises:
            OptionError: if forget lies outside of 0 .. 1, constraints link rows, or options changed so that nothing
                can go on.
        """
        if forget is not None and not 0 < forget <= 1:
            raise OptionError(f"forget must lie in 0 .. 1, got {forget!r}")
        K = self._check_options()
        begun = hasattr(self, "weights_")
        self._check_stream()
        refuse_labels_in_y(y, [K])
        rows = check_rows(self, X, sample_weight, labels=labels, K=K, least=1 if begun else K, reset=not begun)
        stream = getattr(self, "_stream", None)
        if stream is None:
            self._check_columns(rows)
            stream = Stream(self._resolve_prior(rows))
        model = self._model(rows, stream.prior)
        if begun:
            self._check_same_shape(rows)
            self._check_same_form(stream.kept)
        else:
            self._describe_rows(rows)
            self._set_state(self._start(rows, model, random_numbers(self.random_state)))
        statistics = self._expectation(rows, model, self._state)
        self.lower_bound_ = self._bound(model, statistics, self._state)
        self._stream = stream.see(statistics, forget)
        self._set_state(self._maximize(self._stream.total, model, self._state))
        return self

    @property
    def n_batches_seen_(self) -> int:
        """Batches of the stream; a whole ``fit`` counts as one."""
        return self._stream.n_batches

    @property
    def weight_seen_(self) -> float:
        """Weight of all rows of the stream."""
        return self._stream.weight

    def _check_options(self) -> int:
        check_whole_number("n_init", self.n_init, 1)
        check_whole_number("max_iter", self.max_iter, 0)
        check_number("tol", self.tol, 0)
        check_flag("warm_start", self.warm_start)
        check_prior(self.prior)
        if np.ndim(self.reg_covar) == 0:
            check_number("reg_covar", self.reg_covar, 0)
        if self.algorithm not in ALGORITHMS:
            raise OptionError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.batch_size is not None:
            check_whole_number("batch_size", self.batch_size, 1)
        return check_whole_number("n_components", self.n_components, 1)

    def _check_columns(self, rows: Rows) -> None:
        unseen, constant = rows.known_columns()
        added_D = check_added("reg_covar", self.reg_covar, rows.D)
        flat = [column for column in constant if added_D[column] == 0]
        if flat and (self.prior is None or self.prior.psi is None):
            raise SingularComponentError(
                f"column {self._column(flat[0])} of X has the same value in every row, so its variance is 0: leave it "
                "out, or give a reg_covar or a prior with a psi"
            )
        self._compare_added(added_D, rows, np.setdiff1d(np.arange(rows.D), [*constant, *unseen]))
        if unseen:
            warnings.warn(
                f"columns {unseen} of X hold no value: nothing is learned of them; leave them out",
                MixturaWarning,
                stacklevel=3,
            )

    def _compare_added(self, added_D: Floats, rows: Rows, columns: NDArray[np.intp]) -> None:
        """Warn if what is added to the variance of a column is not small against it."""
        variances = rows.frame.scale_D[columns] ** 2
        if (added_D[columns] > MUCH * variances).any():
            worst = columns[(added_D[columns] / variances).argmax()]
            added, variance = added_D[worst], rows.frame.scale_D[worst] ** 2
            warnings.warn(
                f"reg_covar={added:g} is {added / variance:.2g} times the variance of column {self._column(worst)} of "
                "X, so the components are wider there than the data: rescale the column, or give a smaller reg_covar, "
                "or one for each column",
                MixturaWarning,
                stacklevel=4,
            )

    def _column(self, column: int) -> Any:
        """Name of a column, or its index if columns have no names."""
        return repr(self.feature_names_in_[column]) if hasattr(self, "feature_names_in_") else column

    def _check_same_shape(self, rows: Rows) -> None:
        if self.means_.shape != (self.n_components, rows.D):
            raise OptionError(
                f"fitting goes on from means of shape {self.means_.shape}, not ({self.n_components}, {rows.D})"
            )

    def _check_same_form(self, kept: Statistics | None) -> None:
        """Raise ``OptionError`` if ``covariance`` asks for more of covariances than there is to go on from."""
        family, form = find_family(self.covariance), self._covariances.shape
        if family.diagonal != (len(form) == 2) or (kept is not None and kept.pooled and family.name != "EEE"):
            raise OptionError(
                f"covariance={self.covariance!r} cannot go on from what was seen under another covariance; fit a new "
                "mixture"
            )

    def _climb(self, rows: Rows, model: Any, start: Any) -> Fit:
        def update(statistics: Statistics, state: Any) -> Any:
            return self._maximize(statistics, model, state)

        step, bound = partial(self._expectation, rows, model), partial(self._bound, model)
        return climb(step, update, start, max_iter=self.max_iter, tol=self.tol, bound=bound)

    def _keep(self, fit: Fit) -> None:
        if not fit.converged and self.max_iter:
            warnings.warn(
                f"EM stopped after max_iter={self.max_iter} iterations before the lower bound moved by less than "
                f"tol={self.tol}",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._set_state(fit.parameters)
        self.n_iter_, self.converged_ = fit.n_iter, fit.converged
        self.lower_bound_, self.lower_bounds_ = fit.lower_bound, fit.lower_bounds
