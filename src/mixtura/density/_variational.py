"""Variational Bayes of a Gaussian mixture: the posterior, its update, expected scores, and the lower bound.

K components, D columns. The posterior of a mixture is  q(weights) prod_k q(mean_k | precision_k) q(precision_k):

    mean_k | L_k ~ N(means_k, (kappa_k L_k)^-1)       L_k ~ Wishart(dof_k, scale_k^-1), so E[L_k]^-1 = scale_k / dof_k

Diagonal families have Gamma distributions in the place of the Wishart: L_kd ~ Gamma(m dof_k / 2, m scale_kd / 2), where
m is the number of columns that share it, 1, or D in spherical families. Families whose covariance components share
have one L for all, with the counts of all rows.

Source: Bishop, Pattern Recognition and Machine Learning (2006), eq. 10.57-10.77; sticks: Blei and Jordan, Bayesian
Analysis 1 (2006). For full covariances this is what scikit-learn computes; its diagonal, spherical and tied forms keep
the full Wishart's expectations, which bound nothing, and so differ from those here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, digamma, gammaln

from mixtura.density._maximize import TINY_COUNT
from mixtura.density._parameters import LOG_2PI, Scores, precision_roots
from mixtura.density._statistics import Statistics, outer
from mixtura.density.families import Family
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
CONJUGATE = ("EII", "VII", "EEI", "VVI", "EEE", "VVV")


class Posterior(NamedTuple):
    """What is believed of K components.

    Attributes:
        sticks: of a Dirichlet distribution (1, K), or of Beta distributions of the sticks (2, K).
        means_KD: expected means.
        kappa_K: precision of the means, in rows.
        dof_K: degrees of freedom.
        scale: (K, D, D), or (K, D) in diagonal families.
    """

    sticks: Floats
    means_KD: Floats
    kappa_K: Floats
    dof_K: Floats
    scale: Floats

    @property
    def covariances(self) -> Floats:
        """Inverses of the expected precisions."""
        return self.scale / self.dof_K.reshape(-1, *[1] * (self.scale.ndim - 1))


@dataclass(frozen=True)
class VariationalModel:
    """What is believed before the data.

    Attributes:
        family: of the covariances; one of ``CONJUGATE``.
        prior: resolved.
        weights: "process" for a Dirichlet process, "dirichlet" for a Dirichlet distribution.
        concentration: of it.
        reg_covar: added to the diagonal of every component's covariance of the data.
    """

    family: Family
    prior: NIW
    weights: str
    concentration: float
    reg_covar: float | Floats = 0.0

    @property
    def shared(self) -> bool:
        """Whether the components have one covariance."""
        return self.family.volume == "E"


def believe(statistics: Statistics, model: VariationalModel) -> Posterior:
    """The posterior given the statistics of responsibilities."""
    prior, D = model.prior, statistics.first_KD.shape[1]
    count_K = statistics.count_K + TINY_COUNT
    own_KD = statistics.reference_KD + statistics.first_KD / count_K[:, None]
    kappa_K = prior.kappa + count_K
    means_KD = (prior.kappa * prior.mean + count_K[:, None] * own_KD) / kappa_K[:, None]
    scatter = statistics.about(own_KD).second.copy()
    diagonal_KD = scatter if scatter.ndim == 2 else np.einsum("kii->ki", scatter)
    diagonal_KD += model.reg_covar * count_K[:, None]
    pull_K = prior.kappa * count_K / kappa_K
    away_KD = own_KD - prior.mean
    scatter += pull_K.reshape(-1, *[1] * (scatter.ndim - 1)) * outer(away_KD, away_KD, scatter.ndim)
    if model.shared:
        scatter = np.repeat(scatter.sum(0, keepdims=True), len(scatter), 0)
        count_K = np.full_like(count_K, count_K.sum())
    scale = scatter + (prior.psi if scatter.ndim == 3 else np.diag(prior.psi))
    if model.family.shape == "I":
        scale = np.repeat(scale.mean(1, keepdims=True), D, 1)
    return Posterior(_sticks(statistics.count_K + TINY_COUNT, model), means_KD, kappa_K, prior.nu + count_K, scale)


def expected_scores(posterior: Posterior, family: Family) -> Scores:
    """Expected log weight + expected log density."""
    D = posterior.means_KD.shape[1]
    constants_K = expected_log_weights(posterior) + 0.5 * (
        _log_det(posterior, family) - D * LOG_2PI - D / posterior.kappa_K
    )
    return Scores(constants_K, posterior.means_KD, precision_roots(posterior.covariances))


def expected_log_weights(posterior: Posterior) -> Floats:
    """Expected logs of the weights, (K,)."""
    if len(posterior.sticks) == 1:
        return digamma(posterior.sticks[0]) - digamma(posterior.sticks.sum())
    taken_K, left_K = posterior.sticks
    whole_K = digamma(taken_K + left_K)
    passed_K = np.concatenate([[0.0], np.cumsum(digamma(left_K) - whole_K)[:-1]])
    return digamma(taken_K) - whole_K + passed_K


def expected_weights(posterior: Posterior) -> Floats:
    """Expected weights, (K,), of those that have rows; they sum to 1."""
    if len(posterior.sticks) == 1:
        return posterior.sticks[0] / posterior.sticks.sum()
    taken_K, left_K = posterior.sticks / posterior.sticks.sum(0)
    weights_K = taken_K * np.concatenate([[1.0], np.cumprod(left_K)[:-1]])
    return weights_K / weights_K.sum()


def divergence(posterior: Posterior, model: VariationalModel) -> float:
    """Kullback-Leibler divergence of the posterior from the prior, in nats; the bound is log likelihood less this."""
    parts = (_weights_divergence, _means_divergence, _scale_divergence)
    return sum(part(posterior, model) for part in parts)


def _sticks(count_K: Floats, model: VariationalModel) -> Floats:
    if model.weights == "dirichlet":
        return (model.concentration + count_K)[None]
    after_K = np.cumsum(count_K[::-1])[::-1] - count_K
    return np.stack([1 + count_K, model.concentration + after_K])


def _log_det(posterior: Posterior, family: Family) -> Floats:
    """Expected log determinants of the precisions, (K,)."""
    D = posterior.means_KD.shape[1]
    m = _columns_of_one(family, D)
    if posterior.scale.ndim == 3:
        _, logs_K = np.linalg.slogdet(posterior.scale)
        return D * np.log(2) - logs_K + digamma(0.5 * (posterior.dof_K[:, None] - np.arange(D))).sum(1)
    return (digamma(0.5 * m * posterior.dof_K)[:, None] - np.log(0.5 * m * posterior.scale)).sum(1)


def _columns_of_one(family: Family, D: int) -> int:
    """How many columns share a variance in a diagonal family."""
    return D if family.shape == "I" else 1


def _weights_divergence(posterior: Posterior, model: VariationalModel) -> float:
    sticks, prior = posterior.sticks, model.concentration
    if model.weights == "dirichlet":
        K, total, logs_K = sticks.shape[1], sticks.sum(), expected_log_weights(posterior)
        norms = gammaln(total) - gammaln(sticks).sum() - gammaln(K * prior) + K * gammaln(prior)
        return float(norms + ((sticks[0] - prior) * logs_K).sum())
    taken_K, left_K = sticks
    whole_K = digamma(taken_K + left_K)
    logs = (taken_K - 1) * (digamma(taken_K) - whole_K) + (left_K - prior) * (digamma(left_K) - whole_K)
    return float((betaln(1, prior) - betaln(taken_K, left_K) + logs).sum())


def _means_divergence(posterior: Posterior, model: VariationalModel) -> float:
    ratio_K = model.prior.kappa / posterior.kappa_K
    away_KD = posterior.means_KD - model.prior.mean
    D = away_KD.shape[1]
    roots = precision_roots(posterior.covariances)
    white_KD = away_KD * roots if roots.ndim == 2 else np.einsum("ki,kij->kj", away_KD, roots)
    own = D * (ratio_K - 1 - np.log(ratio_K)) + model.prior.kappa * (white_KD**2).sum(1)
    return 0.5 * float(own.sum())


def _scale_divergence(posterior: Posterior, model: VariationalModel) -> float:
    own = _wishart_divergence if posterior.scale.ndim == 3 else _gamma_divergence
    found_K = own(posterior, model)
    return float(found_K[0] if model.shared else found_K.sum())


def _wishart_divergence(posterior: Posterior, model: VariationalModel) -> Floats:
    prior, dof_K, D = model.prior, posterior.dof_K, posterior.scale.shape[1]

    def log_norm(dof: Floats, scale: Floats) -> Floats:
        return 0.5 * dof * (D * np.log(2) - np.linalg.slogdet(scale)[1]) + _multigammaln(0.5 * dof, D)

    traces_K = np.trace(np.linalg.solve(posterior.scale, np.broadcast_to(prior.psi, posterior.scale.shape)), 0, 1, 2)
    norms_K = log_norm(np.asarray(prior.nu), prior.psi) - log_norm(dof_K, posterior.scale)
    return norms_K + 0.5 * (dof_K - prior.nu) * _log_det(posterior, model.family) + 0.5 * dof_K * (traces_K - D)


def _multigammaln(values: Floats, D: int) -> Floats:
    return 0.25 * D * (D - 1) * np.log(np.pi) + gammaln(values[..., None] - 0.5 * np.arange(D)).sum(-1)


def _gamma_divergence(posterior: Posterior, model: VariationalModel) -> Floats:
    m = _columns_of_one(model.family, posterior.scale.shape[1])
    given_D = np.diag(model.prior.psi)
    given_D = given_D.mean(keepdims=True) if model.family.shape == "I" else given_D
    shape_K1, rate = 0.5 * m * posterior.dof_K[:, None], 0.5 * m * posterior.scale[:, : len(given_D)]
    shape_0, rate_0 = 0.5 * m * model.prior.nu, 0.5 * m * given_D
    own = (shape_K1 - shape_0) * digamma(shape_K1) - gammaln(shape_K1) + gammaln(shape_0)
    return (own + shape_0 * (np.log(rate) - np.log(rate_0)) + shape_K1 * (rate_0 - rate) / rate).sum(1)
