"""In and out: parameters, and scikit-learn's own mixtures. D columns, K components."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._base import MixtureBase
from mixtura.density._parameters import precision_roots
from mixtura.density._tables import as_numpy
from mixtura.density.families import ALIASES, find_family

Floats = NDArray[np.floating]
ROUNDING = 1e-5  # of the largest covariance: what float32 leaves of symmetry
SKLEARN_TYPES = {family: alias for alias, family in ALIASES.items()}


class Exchange(MixtureBase):
    """Mixtures from parameters, from and to scikit-learn."""

    @classmethod
    def from_parameters(cls, weights: Any, means: Any, covariances: Any, *, covariance: str | None = None) -> Self:
        """A fitted mixture of known parameters; it can be sampled, queried, and fitted on with ``warm_start``.

        Args:
            weights: (K,) that sum to 1.
            means: (K, D)
            covariances: (K, D, D), or variances (K, D).
            covariance: the family, by default VVV, or VVI for variances.

        Raises:
            ShapeError: if shapes disagree.
            OptionError: if weights are not weights, or covariances not symmetric.
            SingularComponentError: if a covariance is not positive definite.
        """
        weights_K, means_KD, given = (np.asarray(as_numpy(one), dtype=float) for one in (weights, means, covariances))
        family = find_family(covariance or ("VVI" if given.ndim == 2 else "VVV"))
        K, D = len(weights_K), means_KD.shape[-1]
        if weights_K.ndim != 1 or means_KD.shape != (K, D) or given.shape not in ((K, D), (K, D, D)):
            raise ShapeError(
                f"weights, means and covariances must be (K,), (K, D) and (K, D, D) or (K, D), got {weights_K.shape}, "
                f"{means_KD.shape}, {given.shape}"
            )
        if not (weights_K >= 0).all() or not np.isclose(weights_K.sum(), 1):
            raise OptionError(f"weights must not be negative and sum to 1, got {weights_K.tolist()}")
        if not np.isfinite(means_KD).all():
            raise OptionError("means must be finite")
        self = cls(K, covariance=family.name)  # type: ignore[call-arg]
        if given.ndim == 3 and not (np.abs(given - given.swapaxes(1, 2)) <= ROUNDING * np.abs(given).max()).all():
            raise OptionError("covariances must be symmetric and finite")
        if family.diagonal != (given.ndim == 2):
            given = np.diagonal(given, 0, 1, 2) if given.ndim == 3 else given[:, :, None] * np.eye(D)
        precision_roots(given)
        self.weights_, self.means_, self._covariances = weights_K, means_KD, given.copy()
        self.noise_weight_, self.noise_log_density_, self.n_features_in_ = 0.0, None, D
        return self

    @classmethod
    def from_sklearn(cls, mixture: SklearnMixture) -> Self:
        """The same mixture as a fitted one of scikit-learn."""
        check_is_fitted(mixture)
        K, D = mixture.means_.shape
        given = mixture.covariances_
        if mixture.covariance_type == "spherical":
            given = np.repeat(given[:, None], D, 1)
        if mixture.covariance_type == "tied":
            given = np.repeat(given[None], K, 0)
        self = cls.from_parameters(mixture.weights_, mixture.means_, given, covariance=mixture.covariance_type)
        return self.set_params(covariance=mixture.covariance_type, reg_covar=mixture.reg_covar)

    def to_sklearn(self) -> SklearnMixture:
        """The same mixture as a fitted one of scikit-learn; families that it does not have become "full".

        Raises:
            OptionError: if there is a noise component, which it cannot express.
        """
        check_is_fitted(self)
        if self.noise_log_density_ is not None:
            raise OptionError("scikit-learn has no noise component")
        kind = SKLEARN_TYPES.get(find_family(self.covariance).name, "full")  # type: ignore[attr-defined]
        out = SklearnMixture(len(self.weights_), covariance_type=kind)
        full_KDD = self.covariances_
        roots_KDD = precision_roots(full_KDD)
        pick = {
            "full": lambda of: of,
            "tied": lambda of: of[0],
            "diag": lambda of: np.diagonal(of, 0, 1, 2).copy(),
            "spherical": lambda of: of[:, 0, 0].copy(),
        }[kind]
        out.weights_, out.means_, out.n_features_in_ = self.weights_.copy(), self.means_.copy(), self.means_.shape[1]
        out.covariances_, out.precisions_cholesky_ = pick(full_KDD), pick(roots_KDD)
        out.precisions_ = pick(roots_KDD @ roots_KDD.swapaxes(1, 2))
        out.converged_, out.n_iter_, out.lower_bound_ = True, 0, -np.inf
        return out
