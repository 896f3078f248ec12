"""What a classifier does not know, told apart from chance, by predicting pairs of responses to the same input.

Two responses y1, y2 are drawn independently from p(y|x). A model that knows p gains nothing from seeing y1 when it
predicts y2; a model that does not know p "cheats": y1 tells it about p. With the joint J_ij = P(y1=i, y2=j | x) of the
model and p its margin,

    covariance  S(x) = J - p p.T          variance  V_i = p_i (P(y2=i | y1=i) - p_i)

are, for a model that is calibrated on pairs, the mean of (p_true - p)(p_true - p).T over all inputs that the model
cannot tell apart: its error, without the truth being known, and whether or not the model fits. V is 0 where p is known,
and p(1-p) where the response is certain but not known which. Hence bounds: |p_true - p| >= sqrt(V / b) has probability
at most b (Chebyshev), and p_true = 0 has at most 1 - C, with C = p / P(y2=i | y1=i) (Cantelli).

The classifier here predicts the unordered pair as one of K (K+1) / 2 classes, so that J is symmetric and its margin is
p, whatever the estimator. Eigenvalues of S below 0, which no set of distributions has, are set to 0.

Source: Johnson, Tarlow, Duvenaud and Maddison, Experts Don't Cheat, arXiv:2402.08733. They let one network predict y1
and then y2 given y1, in either order; the joint is the same object.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._tables import as_numpy

Floats = NDArray[np.floating]


class PairClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that also says how far its probabilities are from the truth, learned from repeated responses.

    Args:
        estimator: classifier with ``predict_proba`` that is cloned and fitted to unordered pairs. What is found is as
            good as its calibration: limit its capacity by rows held out, as for any probabilities.

    Attributes:
        classes_: labels of responses, sorted, (K,).
        estimator_: the fitted classifier of pairs, or of responses where there was one for each row.
        paired_: whether there were more responses than one for each row.
        n_features_in_: D.
    """

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to several independent responses for each input.

        Args:
            X: (N, D), as the estimator takes it.
            y: responses (N, R); all R (R-1) / 2 pairs of a row are used. With one response (N,) probabilities are
                learned, but not what is unknown about them.
            sample_weight: (N,), for an estimator that takes it.

        Raises:
            ValueError: if X and y are not finite and of the same length (scikit-learn's own words).
        """
        X, y = validate_data(self, as_numpy(X), as_numpy(y), multi_output=True, dtype=None, ensure_all_finite=False)
        y = y if y.ndim == 2 and y.shape[1] > 1 else column_or_1d(y, warn=True)
        check_classification_targets(y.ravel())
        self.classes_, codes = np.unique(y, return_inverse=True)
        codes_NR = codes.reshape(len(y), -1)
        self.paired_ = codes_NR.shape[1] > 1
        one_P, two_P = np.triu_indices(codes_NR.shape[1], 1) if self.paired_ else ([0], [0])
        kinds_NP = _pair_code(codes_NR[:, one_P], codes_NR[:, two_P]) if self.paired_ else codes_NR
        options = {}
        if sample_weight is not None:
            weights_N = _check_sample_weight(as_numpy(sample_weight), X, ensure_non_negative=True)
            options["sample_weight"] = np.repeat(weights_N, len(one_P))
        self.estimator_ = clone(self.estimator).fit(np.repeat(X, len(one_P), axis=0), kinds_NP.ravel(), **options)
        return self

    def predict_joint(self, X: Any) -> Floats:
        """Joint probabilities of two responses, (N, K, K), symmetric; rows add up to ``predict_proba``.

        Raises:
            OptionError: if the classifier was fitted to one response for each row.
        """
        proba_NC = self._proba(X)
        if not self.paired_:
            raise OptionError("y of fit must hold two responses or more for each row, (N, R), got one")
        low_C, high_C = _pair_members(self.estimator_.classes_)
        joint_NKK = np.zeros((len(proba_NC), len(self.classes_), len(self.classes_)))
        half_NC = np.where(low_C == high_C, proba_NC, proba_NC / 2)
        joint_NKK[:, low_C, high_C] = half_NC
        joint_NKK[:, high_C, low_C] = half_NC
        return joint_NKK

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities of one response, (N, K)."""
        proba_NC = self._proba(X)
        if not self.paired_:
            return proba_NC
        members_C = _pair_members(self.estimator_.classes_)
        shares_CK = sum(np.eye(len(self.classes_))[which_C] for which_C in members_C) / 2
        proba_NK: Floats = proba_NC @ shares_CK
        return proba_NK

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable response, (N,)."""
        proba_NK = self.predict_proba(X)
        return self.classes_[proba_NK.argmax(1)]

    def epistemic_covariance(self, X: Any) -> Floats:
        """Expected (p_true - p)(p_true - p).T over the inputs that the classifier cannot tell apart, (N, K, K).

        Its diagonal is the expected squared error of each probability.

        Raises:
            OptionError: if the classifier was fitted to one response for each row.
        """
        return epistemic_covariance(self.predict_joint(X))

    def _proba(self, X: Any) -> Floats:
        check_is_fitted(self)
        X = validate_data(self, as_numpy(X), reset=False, dtype=None, ensure_all_finite=False)
        return np.asarray(self.estimator_.predict_proba(X), dtype=np.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = get_tags(self.estimator).input_tags.allow_nan
        return tags


def epistemic_covariance(joint: Any) -> Floats:
    """J - p p.T of joint probabilities of two responses, its eigenvalues below 0 set to 0.

    Args:
        joint: (..., K, K), not negative, with a sum of 1; what is not symmetric is averaged over both orders.

    Returns:
        (..., K, K), positive semidefinite; rows add up to 0.

    Raises:
        ShapeError: if the last two axes differ.
        OptionError: if they are no probabilities.
    """
    joint = np.asarray(as_numpy(joint), dtype=np.float64)
    if joint.ndim < 2 or joint.shape[-1] != joint.shape[-2]:
        raise ShapeError(f"joint must be (..., K, K), got shape {joint.shape}")
    if not (joint > -1e-9).all() or not np.allclose(joint.sum((-1, -2)), 1, atol=1e-6):
        raise OptionError("joint must hold probabilities, not negative and with a sum of 1 over the last two axes")
    joint = (joint + joint.swapaxes(-1, -2)) / 2
    p = joint.sum(-1)
    values, vectors = np.linalg.eigh(joint - p[..., :, None] * p[..., None, :])
    covariance: Floats = (vectors * values.clip(0)[..., None, :]) @ vectors.swapaxes(-1, -2)
    return covariance


def probability_radius(variance: Any, miss: float) -> Floats:
    """Half width of an interval about p that holds p_true but for a share ``miss`` of inputs, sqrt(V / miss).

    Args:
        variance: V, expected squared errors of probabilities, of any shape.
        miss: between 0 and 1.

    Raises:
        OptionError: if miss lies outside, or a variance is negative.
    """
    if not 0 < miss <= 1:
        raise OptionError(f"miss must lie in 0 .. 1, got {miss!r}")
    variance = np.asarray(as_numpy(variance), dtype=np.float64)
    if not (variance > -1e-12).all():
        raise OptionError(f"variance must be at least 0, got {variance.min()!r}")
    radius: Floats = np.sqrt(variance.clip(0) / miss)
    return radius


def epistemic_confidence(log_p: Any, log_p_again: Any) -> Floats:
    """C = p(y | x) / p(y | x, y was seen once): 1 where seeing a response teaches nothing about it.

    Of a model that is calibrated on pairs, a response drawn from it is impossible (p_true = 0) with a probability of at
    most 1 - C. For sequences these are the log probabilities of a whole response, first and after itself.

    Args:
        log_p: log probability of a response, of any shape, in nats.
        log_p_again: the same after that response was seen.

    Returns:
        Of the same shape, in 0 .. 1; where seeing the response made it less likely, 1.

    Raises:
        ShapeError: if shapes differ.
    """
    log_p, log_p_again = (np.asarray(as_numpy(x), dtype=np.float64) for x in (log_p, log_p_again))
    if log_p.shape != log_p_again.shape:
        raise ShapeError(f"log_p and log_p_again must have the same shape, got {log_p.shape} and {log_p_again.shape}")
    confidence: Floats = np.exp(np.minimum(log_p - log_p_again, 0))
    return confidence


def _pair_code(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
    """The unordered pair as one number."""
    low, high = np.minimum(one, two), np.maximum(one, two)
    return high * (high + 1) // 2 + low


def _pair_members(codes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both members of pairs."""
    high = ((np.sqrt(8 * codes + 1) - 1) // 2).astype(np.intp)
    return codes - high * (high + 1) // 2, high
