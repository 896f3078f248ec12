"""Partitions of rows into Gaussian groups, judged with parameters integrated out, and moves between them.

A partition has the probability, up to a constant (a Dirichlet process of concentration alpha over groups, and a
normal-inverse-Wishart prior in each),

    p(partition, X) ~ product over groups of  alpha * Gamma(n_k) * f(X_k)

with f the marginal likelihood of a group,

    ln f(X_k) = -n D/2 ln pi + ln G_D(nu_n/2) - ln G_D(nu/2) + nu/2 ln|psi| - nu_n/2 ln|psi_n| + D/2 ln(kappa/kappa_n)
    kappa_n = kappa + n,  nu_n = nu + n,  psi_n = psi + scatter + kappa n/kappa_n (mean_k - mean)(mean_k - mean).T

so that the ratio for a split of one group into two is  H = alpha G(n_1) f(X_1) G(n_2) f(X_2) / (G(n) f(X)), and 1 / H
for the merge that undoes it. A row of weight 2 counts as two rows.

Source: Murphy, Conjugate Bayesian analysis of the Gaussian distribution (2007), eq. 266; Chang and Fisher, NIPS 2013.

N rows, D columns, K groups.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from sklearn.exceptions import ConvergenceWarning

from mixtura.core.errors import OptionError
from mixtura.density import _init
from mixtura.density._rows import Rows
from mixtura.density._statistics import Statistics
from mixtura.density.gaussian_mixture import GaussianMixture
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
Groups = NDArray[np.intp]
HALVING = 10  # EM iterations that two halves get before they are judged
SETTLING = 5  # EM iterations of all groups between moves


def log_marginals(statistics: Statistics, prior: NIW) -> Floats:
    """Log marginal likelihood of the rows of each group, (K,).

    Args:
        statistics: of the groups about their means, second moments (K, D, D).
        prior: resolved.
    """
    n_K, D = statistics.count_K, statistics.first_KD.shape[1]
    kappa_K, nu_K = prior.kappa + n_K, prior.nu + n_K
    away_KD = np.where(n_K[:, None] > 0, statistics.reference_KD - prior.mean, 0.0)
    pull_K = prior.kappa * n_K / kappa_K
    psi_KDD = prior.psi + statistics.second + pull_K[:, None, None] * away_KD[:, :, None] * away_KD[:, None]
    logs = 0.5 * prior.nu * np.linalg.slogdet(prior.psi)[1] - 0.5 * nu_K * np.linalg.slogdet(psi_KDD)[1]
    logs += _log_gamma(0.5 * nu_K, D) - _log_gamma(np.array([0.5 * prior.nu]), D)
    return logs + 0.5 * D * (np.log(prior.kappa) - np.log(kappa_K)) - 0.5 * n_K * D * np.log(np.pi)


def _log_gamma(values_K: Floats, D: int) -> Floats:
    """Log of the multivariate gamma function."""
    return 0.25 * D * (D - 1) * np.log(np.pi) + gammaln(values_K[:, None] - 0.5 * np.arange(D)).sum(1)


def group_statistics(rows: Rows, groups_N: Groups, K: int) -> Statistics:
    """Statistics of groups about their means; each row is looked at once."""
    count_K, means_KD, second_KDD = np.zeros(K), np.zeros((K, rows.D)), np.zeros((K, rows.D, rows.D))
    order_N = np.argsort(groups_N, kind="stable")
    bounds = np.searchsorted(groups_N[order_N], np.arange(K + 1))
    for k in np.flatnonzero(np.diff(bounds)):
        own = order_N[bounds[k] : bounds[k + 1]]
        x_MD = rows.data_ND[own].astype(np.float64)
        weights_M = np.ones(len(own)) if rows.weights_N is None else rows.weights_N[own]
        count_K[k] = weights_M.sum()
        means_KD[k] = weights_M @ x_MD / count_K[k]
        x_MD -= means_KD[k]
        second_KDD[k] = (x_MD * weights_M[:, None]).T @ x_MD
    return Statistics(count_K, np.zeros_like(means_KD), second_KDD, means_KD)


def joined(statistics: Statistics, one: NDArray[np.intp], other: NDArray[np.intp]) -> Statistics:
    """Statistics of pairs of groups, each pair as one group."""
    n_P, m_P = statistics.count_K[one], statistics.count_K[other]
    away_PD = statistics.reference_KD[other] - statistics.reference_KD[one]
    share_P = m_P / (n_P + m_P)
    between = (n_P * share_P)[:, None, None] * away_PD[:, :, None] * away_PD[:, None]
    second = statistics.second[one] + statistics.second[other] + between
    means_PD = statistics.reference_KD[one] + share_P[:, None] * away_PD
    return Statistics(n_P + m_P, np.zeros_like(means_PD), second, means_PD)


class Partition(NamedTuple):
    """Groups 0 .. K - 1 of rows, none of them empty; those with labelled rows come first, in the order of labels."""

    groups_N: Groups
    K: int


@dataclass(frozen=True)
class Judge:
    """What partitions of rows are worth.

    Attributes:
        rows: to be divided; a label is the group that a row stays in, -1 where it may be in any.
        prior: resolved.
        alpha: concentration.
        least: groups of no more rows, by weight, are not split.
    """

    rows: Rows
    prior: NIW
    alpha: float
    least: float

    def worths(self, statistics: Statistics) -> Floats:
        """ln(alpha Gamma(n_k) f(X_k)) of each group, (K,); 0 for an empty one."""
        n_K = statistics.count_K
        own_K = np.log(self.alpha) + gammaln(np.where(n_K > 0, n_K, 1.0)) + log_marginals(statistics, self.prior)
        return np.where(n_K > 0, own_K, 0.0)

    def log_joint(self, partition: Partition) -> float:
        """Log probability of partition and rows, up to a constant."""
        return float(self.worths(group_statistics(self.rows, *partition)).sum())

    def labelled(self, K: int) -> NDArray[np.bool_]:
        """Which groups hold labelled rows, (K,)."""
        labels = self.rows.labels
        return np.isin(np.arange(K), [] if labels is None else labels)


def split(judge: Judge, partition: Partition, rng: np.random.RandomState) -> Partition:
    """Each group is offered a division in two, and takes it with probability min(1, H).

    Labelled rows stay in the first half, which keeps the group's number; second halves are new groups.
    """
    groups_N, K = partition
    before = group_statistics(judge.rows, groups_N, K)
    offered_N = 2 * groups_N
    for k in np.flatnonzero(before.count_K > judge.least):
        own = np.flatnonzero(groups_N == k)
        offered_N[own] += halves(judge, own, rng)
    after = group_statistics(judge.rows, offered_N, 2 * K)
    halved_K = (after.count_K.reshape(K, 2) > 0).all(1)
    log_H_K = judge.worths(after).reshape(K, 2).sum(1) - judge.worths(before)
    taken_K = halved_K & (np.log(rng.uniform(size=K)) < log_H_K)
    new_K = K - 1 + np.cumsum(taken_K)
    moved_N = taken_K[groups_N] & (offered_N % 2 == 1)
    return Partition(np.where(moved_N, new_K[groups_N], groups_N), K + int(taken_K.sum()))


def halves(judge: Judge, own: NDArray[np.intp], rng: np.random.RandomState) -> Groups:
    """0 or 1 for each of some rows, by 2-means and a few EM iterations; 0 for labelled rows, and where all are one."""
    rows = judge.rows
    weights_M = None if rows.weights_N is None else rows.weights_N[own]
    labels_M = None if rows.labels is None else np.where(rows.labels[own] >= 0, 0, -1)
    part = Rows(rows.data_ND[own], weights_M, labels_M if labels_M is not None and labels_M.max() == 0 else None)
    try:
        start_M = _init.keep_labels(_init.kmeans(part, np.eye(rows.D), 2, rng), part.labels)
    except OptionError:
        return np.zeros(len(own), np.intp)
    return assign(part, judge.prior, start_M, 2, HALVING)


def merge(judge: Judge, partition: Partition, rng: np.random.RandomState) -> Partition:
    """Each group is offered the partner with the least H, and joins it with probability min(1, 1 / H).

    A group joins at most one other in a turn. Two groups with labels stay apart; one without may join one with.
    """
    groups_N, K = partition
    log_H_KK, free_K, into_K = _log_ratios(judge, partition), np.ones(K, bool), np.arange(K)
    for k in rng.permutation(K):
        log_H_K = np.where(free_K, log_H_KK[k], np.inf)
        j = int(log_H_K.argmin())
        if free_K[k] and np.log(rng.uniform()) < -log_H_K[j]:
            into_K[max(j, k)] = min(j, k)
            free_K[[j, k]] = False
    return renumbered(into_K[groups_N])


def _log_ratios(judge: Judge, partition: Partition) -> Floats:
    """ln H of every pair of groups, (K, K); inf where they may not join."""
    K = partition.K
    statistics, labelled_K = group_statistics(judge.rows, *partition), judge.labelled(K)
    one, other = np.triu_indices(K, 1)
    allowed = ~(labelled_K[one] & labelled_K[other])
    one, other = one[allowed], other[allowed]
    worths_K, out_KK = judge.worths(statistics), np.full((K, K), np.inf)
    out_KK[one, other] = worths_K[one] + worths_K[other] - judge.worths(joined(statistics, one, other))
    return np.minimum(out_KK, out_KK.T)


def renumbered(groups_N: Groups) -> Partition:
    """The same groups without gaps in their numbers."""
    kept, groups_N = np.unique(groups_N, return_inverse=True)
    return Partition(groups_N.ravel(), len(kept))


def settle(judge: Judge, partition: Partition) -> Partition:
    """The partition after some EM iterations; groups that lose all rows are gone."""
    return renumbered(assign(judge.rows, judge.prior, *partition, SETTLING))


def assign(rows: Rows, prior: NIW, start_N: Groups, K: int, iterations: int) -> Groups:
    """The most probable component of each row after EM from given components; labelled rows stay where they are."""
    mixture = GaussianMixture(K, prior=prior, init=start_N, max_iter=iterations, tol=1e-4, reg_covar=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is not meant to converge
        mixture.fit(rows.data_ND, labels=rows.labels, sample_weight=rows.weights_N)
    return _init.keep_labels(mixture.predict(rows.data_ND), rows.labels)
