"""A Bayes mixture of given models, updated by what each of them said of the data; and what it costs to learn by it.

M models, which may be far more than there are data, have prior weights w. The mixture predicts the next outcome by

    q(y_t | x_t, past) = sum_m w_m(past) p_m(y_t | x_t)          w_m(past) ~ w_m prod_{s<t} p_m(y_s | x_s)

so its log loss over n outcomes is that of the batch mixture, -ln sum_m w_m prod_t p_m. Its regret against the truth is
ruled by the weight of the models near the truth, not by M: for every level e, with W(e) the prior weight of models
whose Kullback-Leibler divergence D_m from the truth is at most e,

    E[regret] <= -ln sum_m w_m exp(-n D_m) <= min_e ( n e - ln W(e) )

The second is the paper's; the first is sharper and follows from the concavity of -ln sum_m w_m exp(-L_m) in the losses.
A model that is in the class M0 times costs ln(M / M0) at most, for every sequence of outcomes.

Source: Feder, Urbanke and Fogel, arXiv:2506.07661.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_number, check_whole_number
from mixtura.density._parameters import safe_log
from mixtura.density._tables import as_numpy

Floats = NDArray[np.floating]


class BayesMixture:
    """Weights of M models by Bayes' rule, which is exponential weighting with log loss at rate 1.

    Args:
        prior: M for equal weights, or prior weights (M,), which are normalized.

    Attributes:
        log_loss_: nats that the mixture has paid so far, the sum of -ln q.

    Raises:
        OptionError: if weights are negative, not finite, or all zero.
        ShapeError: if they are no vector.
    """

    def __init__(self, prior: Any) -> None:
        self._log_weights_M = _log_prior(prior)
        self.log_loss_ = 0.0

    @property
    def weights_(self) -> Floats:
        """Weights of the models after all that was seen, (M,)."""
        return np.exp(self._log_weights_M)

    def update(self, log_likelihood_NM: Any) -> Floats:
        """Learn from N outcomes one after the other.

        Args:
            log_likelihood_NM: what model m says of outcome n, ln p_m(y_n | x_n), (N, M): a column is
                ``score_samples`` of a density, or the observed class's column of ``predict_log_proba``. -inf where a
                model rules an outcome out.

        Returns:
            ln q of each outcome by the mixture that had seen those before it, (N,).

        Raises:
            ShapeError: if there is another number of models.
            OptionError: if a number is NaN or +inf, or every model that has weight rules an outcome out.
        """
        log_NM = np.atleast_2d(np.asarray(as_numpy(log_likelihood_NM), dtype=np.float64))
        M = len(self._log_weights_M)
        if log_NM.ndim != 2 or log_NM.shape[1] != M:
            raise ShapeError(f"log_likelihood_NM must have a column for each of {M} models, got {log_NM.shape}")
        if not (log_NM < np.inf).all():
            raise OptionError("log_likelihood_NM must hold no NaN and no +inf")
        joint_NM = self._log_weights_M + np.cumsum(log_NM, axis=0)
        totals_N = logsumexp(joint_NM, axis=1)
        if not np.isfinite(totals_N).all():
            raise OptionError(f"outcome {int(np.isinf(totals_N).argmax())} is ruled out by every model that has weight")
        if len(log_NM):
            self._log_weights_M = joint_NM[-1] - totals_N[-1]
            self.log_loss_ -= float(totals_N[-1])
        return np.diff(totals_N, prepend=0.0)

    def predict(self, probabilities: Any) -> Floats:
        """Average predictions of the models, weighted by what they have earned.

        Args:
            probabilities: (M, ...), the models first.

        Raises:
            ShapeError: if there is another number of models.
        """
        values = np.asarray(as_numpy(probabilities))
        if values.ndim == 0 or len(values) != len(self._log_weights_M):
            raise ShapeError(f"probabilities must be ({len(self._log_weights_M)}, ...), got shape {values.shape}")
        return np.tensordot(self.weights_, values, 1)


class RegretBound(NamedTuple):
    """What a Bayes mixture pays at most, in nats, in expectation over n outcomes of the truth.

    Attributes:
        bound: min_e n e - ln W(e), the paper's.
        level: the e that reaches it: divergence up to which models count as near.
        weight: W(e), the prior weight of those models: large for a simple truth.
        sharper: -ln sum_m w_m exp(-n D_m), never above ``bound``.
    """

    bound: float
    level: float
    weight: float
    sharper: float


def regret_bound(divergences_M: Any, n: int, prior: Any = None) -> RegretBound:
    """Bound the expected regret of a Bayes mixture against the truth.

    Args:
        divergences_M: Kullback-Leibler divergence of each model from the truth for one outcome, in nats, averaged over
            inputs; 0 for the truth itself, inf where a model rules out what can happen. (M,)
        n: number of outcomes.
        prior: weights (M,), or None for equal ones.

    Raises:
        OptionError: if a divergence is negative or NaN, or all models that have weight are infinitely far.
        ShapeError: if there is not a weight for each divergence.
    """
    divergences_M, log_M = _near(divergences_M, prior)
    n = check_whole_number("n", n, 0)
    possible_M = np.isfinite(divergences_M) & np.isfinite(log_M)
    if not possible_M.any():
        raise OptionError("divergences_M must be finite for a model that has weight")
    divergences_M, log_M = divergences_M[possible_M], log_M[possible_M]
    order = np.argsort(divergences_M, kind="stable")
    levels_M, log_weights_M = divergences_M[order], np.logaddexp.accumulate(log_M[order])
    bounds_M = n * levels_M - log_weights_M
    best = int(bounds_M.argmin())
    sharper = -logsumexp(log_M - n * divergences_M)
    return RegretBound(float(bounds_M[best]), float(levels_M[best]), float(np.exp(log_weights_M[best])), float(sharper))


def hypothesis_weight(divergences_M: Any, level: float, prior: Any = None) -> float:
    """Prior weight of the models within ``level`` nats of the truth.

    Args:
        divergences_M: as in ``regret_bound``.
        level: in nats, at least 0.
        prior: as in ``regret_bound``.
    """
    divergences_M, log_M = _near(divergences_M, prior)
    return float(np.exp(log_M[divergences_M <= check_number("level", level, 0)]).sum())


def _near(divergences_M: Any, prior: Any) -> tuple[Floats, Floats]:
    """Divergences and log prior weights, checked."""
    divergences_M = np.asarray(as_numpy(divergences_M), dtype=np.float64)
    if divergences_M.ndim != 1 or not len(divergences_M):
        raise ShapeError(f"divergences_M must be (M,), got shape {divergences_M.shape}")
    if not (divergences_M >= 0).all():
        raise OptionError(f"divergences_M must be at least 0, got {divergences_M.min()!r}")
    log_M = _log_prior(len(divergences_M) if prior is None else prior)
    if log_M.shape != divergences_M.shape:
        raise ShapeError(f"prior must hold {len(divergences_M)} weights, got {len(log_M)}")
    return divergences_M, log_M


def _log_prior(prior: Any) -> Floats:
    if np.ndim(prior) == 0:
        M = check_whole_number("prior", prior, 1)
        return np.full(M, -np.log(M))
    weights_M = np.asarray(as_numpy(prior), dtype=np.float64)
    if weights_M.ndim != 1:
        raise ShapeError(f"prior must be (M,), got shape {weights_M.shape}")
    if not (np.isfinite(weights_M).all() and (weights_M >= 0).all() and weights_M.any()):
        raise OptionError("prior must hold finite weights, not negative, and not all zero")
    log_M: Floats = safe_log(weights_M) - np.log(weights_M.sum())
    return log_M
