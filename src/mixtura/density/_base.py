"""What Gaussian mixtures of every kind share: from scores to densities, responsibilities and components.

N rows, D columns, K components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from mixtura.density._checks import mixture_frame
from mixtura.density._em import Index, evaluate
from mixtura.density._parameters import Parameters, Scores, full_covariances, scores_of
from mixtura.density._rows import Rows
from mixtura.density._tables import as_numpy, check_table

Floats = NDArray[np.floating]


class MixtureBase(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    """Scores of rows under fitted components. A subclass fits, and says what its scores are."""

    algorithm: str
    batch_size: int | None
    weights_: Floats
    means_: Floats
    noise_weight_: float
    noise_log_density_: float | None

    def _scores(self) -> Scores:
        """By what responsibilities are found."""
        return scores_of(self.parameters_)

    @property
    def parameters_(self) -> Parameters:
        """Weights, means and covariances; the covariances of diagonal families as (K, D)."""
        check_is_fitted(self)
        return Parameters(self.weights_, self.means_, self._covariances, self.noise_weight_)

    @property
    def covariances_(self) -> Floats:
        """Covariances of the components, (K, D, D) in every family."""
        check_is_fitted(self)
        return full_covariances(self._covariances)

    def _rows(self, X: Any) -> Rows:
        data_ND = check_table(self, X, reset=False)
        diagonals_KD = self._covariances if self._covariances.ndim == 2 else np.diagonal(self._covariances, 0, 1, 2)
        frame = mixture_frame(self.weights_, self.means_, diagonals_KD)
        return Rows(data_ND, batch_size=self.batch_size, given_frame=frame)

    def _log_noise(self) -> float | None:
        if self.noise_log_density_ is None:
            return None
        return float(self.noise_log_density_ + np.log(max(self.noise_weight_, np.finfo(float).tiny)))

    def _evaluate(self, rows: Rows, scores: Scores) -> Iterator[tuple[Index, Floats, Floats]]:
        return evaluate(rows, scores, algorithm=self.algorithm, log_noise=self._log_noise())

    def score_samples(self, X: Any) -> Floats:
        """Log density of each row, over its observed columns, in nats.

        Args:
            X: (N, D); NaN where a value is missing.

        Returns:
            (N,)
        """
        check_is_fitted(self)
        rows = self._rows(X)
        out_N = np.empty(rows.N, rows.data_ND.dtype)
        for part, _, norm_M in self._evaluate(rows, scores_of(self.parameters_)):
            out_N[part] = norm_M
        return out_N

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log density of the rows, weighted."""
        total, weight = self._total_log_likelihood(X, sample_weight)
        return total / weight

    def predict(self, X: Any) -> NDArray[np.intp]:
        """The most probable component of each row, (N,); -1 for the noise component."""
        check_is_fitted(self)
        rows = self._rows(X)
        out_N = np.empty(rows.N, np.intp)
        for part, shares_KM, _ in self._evaluate(rows, self._scores()):
            out_N[part] = shares_KM.argmax(0)
        return np.where(out_N == len(self.weights_), -1, out_N)

    def predict_proba(self, X: Any) -> Floats:
        """Responsibilities: the probability of each component given the row.

        Returns:
            (N, K), or (N, K + 1) with the noise component last.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        K = len(self.weights_) + (self.noise_log_density_ is not None)
        out_NK = np.empty((rows.N, K), rows.data_ND.dtype)
        for part, shares_KM, _ in self._evaluate(rows, self._scores()):
            out_NK[part] = shares_KM.T
        return out_NK

    def transform(self, X: Any) -> Floats:
        """Responsibilities, as features."""
        return self.predict_proba(X)

    def fit_predict(self, X: Any, y: Any = None, **options: Any) -> NDArray[np.intp]:
        """Fit, then the most probable component of each row."""
        return self.fit(X, y, **options).predict(X)  # type: ignore[attr-defined]

    @property
    def _n_features_out(self) -> int:
        return len(self.weights_) + (self.noise_log_density_ is not None)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _total_log_likelihood(self, X: Any, sample_weight: Any) -> tuple[float, float]:
        """Weighted sum of log densities, and the sum of weights."""
        log_N = self.score_samples(X).astype(np.float64)
        if sample_weight is None:
            return float(log_N.sum()), float(len(log_N))
        weights_N = _check_sample_weight(as_numpy(sample_weight), log_N[:, None], ensure_non_negative=True)
        return float(weights_N @ log_N), float(weights_N.sum())
