"""How many components, and of which family: every candidate is fitted, and a criterion chooses, as R's mclust does.

N rows, D columns, K components.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import MixturaWarning, OptionError, ShapeError
from mixtura.density import _init
from mixtura.density._candidates import Candidate, Table, distinct_families, try_size
from mixtura.density._checks import check_whole_number, random_numbers
from mixtura.density._labels import check_labels, refuse_labels_in_y
from mixtura.density._tables import as_numpy, check_table
from mixtura.density.families import FAMILIES, Family, find_family
from mixtura.density.gaussian_mixture import GaussianMixture

Floats = NDArray[np.floating]
CRITERIA = ("bic", "icl", "aic", "cv")


class MixtureSearch(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    """Gaussian mixtures of several sizes and covariance families, of which a criterion chooses one.

    Args:
        n_components: numbers of components to try.
        covariance: "all" 14 families, or the names of some. Families that are the same model for a number of
            components or columns are tried once, under the first of their names.
        criterion: "bic", "icl" (BIC that also asks for separate components), "aic", or "cv": minus twice the log
            likelihood of rows held out. Lower is better in each.
        init: names of starts, of which the best result counts; the families share them.
        mixture: a ``GaussianMixture`` whose other options every candidate has; by default one that ends at a
            tolerance of 1e-5 or after 1000 iterations, so that criteria can be compared, and has a reg_covar of 0: a
            candidate of which a component collapses is out, as in mclust, instead of winning by it.
        cv: number of parts for "cv", or what scikit-learn takes in its place.
        n_jobs: processes, as in joblib; results do not depend on it.
        random_state: seed of the starts and of the parts; a candidate is the same whichever others are tried.

    Attributes:
        best_estimator_: the mixture chosen, fitted to all rows.
        best_: its ``Candidate``.
        candidates_: every ``Candidate``, the best first.
        n_features_in_: D.

    Source: Scrucca et al., mclust 5, The R Journal 8 (2016); ICL: Biernacki, Celeux and Govaert, IEEE PAMI 22 (2000).
    """

    def __init__(
        self,
        n_components: Any = (1, 2, 3, 4, 5, 6, 7, 8, 9),
        *,
        covariance: Any = "all",
        criterion: str = "bic",
        init: Any = ("hierarchical", "kmeans"),
        mixture: GaussianMixture | None = None,
        cv: Any = 5,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.criterion = criterion
        self.init = init
        self.mixture = mixture
        self.cv = cv
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, labels: Any = None) -> Self:
        """Fit every candidate and keep the best.

        Args:
            X: (N, D); NaN where a value is missing.
            y: ignored, as in ``GaussianMixture.fit``.
            sample_weight: (N,).
            labels: as in ``GaussianMixture.fit``; sizes with fewer components than there are classes are not tried, and
                with probabilities of K components only K is.

        Raises:
            OptionError: naming the argument, or if no candidate could be fitted.
        """
        sizes, families, inits = self._check_options()
        data_ND = check_table(self, X, reset=True)
        refuse_labels_in_y(y, sizes)
        labels, sizes = _labels(labels, len(data_ND), sizes)
        table = Table(data_ND, labels, as_numpy(sample_weight), self.criterion, self.cv, self._seed())
        base = GaussianMixture(tol=1e-5, max_iter=1000, reg_covar=0) if self.mixture is None else self.mixture
        tasks = [(K, distinct_families(families, K, data_ND.shape[1]), init) for init in inits for K in sizes]
        found = Parallel(n_jobs=self.n_jobs)(delayed(try_size)(table, base, *task) for task in tasks)
        self._choose([one for part in found for one in part], sizes, len(data_ND))
        if hasattr(self, "feature_names_in_"):
            self.best_estimator_.feature_names_in_ = self.feature_names_in_
        return self

    def _seed(self) -> int:
        return int(random_numbers(self.random_state).randint(np.iinfo(np.int32).max))

    def _check_options(self) -> tuple[list[int], list[Family], list[str]]:
        given = [self.n_components] if np.ndim(self.n_components) == 0 else self.n_components
        sizes = sorted({check_whole_number("n_components", K, 1) for K in given})
        names = FAMILIES if isinstance(self.covariance, str) and self.covariance == "all" else _names(self.covariance)
        families = list(dict.fromkeys(find_family(name) for name in names))
        inits = _names(self.init)
        if self.criterion not in CRITERIA:
            raise OptionError(f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        for name, given in (("n_components", sizes), ("covariance", families), ("init", inits)):
            if not given:
                raise OptionError(f"{name} must name at least one, got none")
        for init in inits:
            if init not in _init.NAMES:
                raise OptionError(f"init must be of {', '.join(_init.NAMES)}, got {init!r}")
        if isinstance(self.cv, int):
            check_whole_number("cv", self.cv, 2)
        return sizes, families, inits

    def _choose(self, found: list[tuple[Candidate, GaussianMixture | None]], sizes: list[int], N: int) -> None:
        found.sort(key=lambda pair: (pair[0].score, pair[0].n_parameters))  # stable: the first name wins
        best, mixture = found[0]
        if mixture is None:
            raise OptionError(
                f"no candidate could be fitted to n_samples={N}; of n_components={best.n_components}: {best.error}"
            )
        self.best_, self.best_estimator_ = best, mixture
        self.candidates_ = [candidate for candidate, _ in found]
        if not best.converged:
            warnings.warn(
                f"the best candidate, {best.covariance} with {best.n_components} components, did not converge; give a "
                "mixture with a larger max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )
        if best.n_components == sizes[-1] and len(sizes) > 1:
            warnings.warn(
                f"the best candidate has the largest n_components that was tried, {sizes[-1]}; try more",
                MixturaWarning,
                stacklevel=3,
            )

    def score_samples(self, X: Any) -> Floats:
        """Log density of each row, (N,)."""
        return self._best(X).score_samples(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log density of the rows, weighted."""
        return self._best(X).score(X, sample_weight=sample_weight)

    def predict(self, X: Any) -> NDArray[np.intp]:
        """The most probable component of each row, (N,)."""
        return self._best(X).predict(X)

    def predict_proba(self, X: Any) -> Floats:
        """Responsibilities, (N, K)."""
        return self._best(X).predict_proba(X)

    def transform(self, X: Any) -> Floats:
        """Responsibilities, as features."""
        return self.predict_proba(X)

    def fit_predict(self, X: Any, y: Any = None, **options: Any) -> NDArray[np.intp]:
        """Fit, then the most probable component of each row."""
        return self.fit(X, y, **options).predict(X)

    def _best(self, X: Any) -> GaussianMixture:
        check_is_fitted(self)
        check_table(self, X, reset=False)
        return self.best_estimator_

    @property
    def _n_features_out(self) -> int:
        return self.best_estimator_._n_features_out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _names(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _labels(labels: Any, N: int, sizes: list[int]) -> tuple[NDArray[Any] | None, list[int]]:
    """Checked labels, and the sizes that have a component for each of them."""
    if labels is None:
        return None, sizes
    labels = np.asarray(as_numpy(labels))
    soft = labels.ndim == 2 and labels.shape[1] > 1
    labels = check_labels(labels, N, labels.shape[1] if soft else sizes[-1])
    if labels is None:
        return None, sizes
    fitting = [K for K in sizes if (labels.shape[1] == K if soft else labels.max() < K)]
    if not fitting:
        raise ShapeError(f"labels have {labels.shape[1]} columns, and no n_components tried is as large")
    return labels, fitting
