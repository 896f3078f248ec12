"""Clusters of unequal shape by semidefinite programs adjusted to the likelihood (iLA-SDP), without centers to miss.

Cluster k with rows I_k is the matrix Z_k = 1 1.T / n_k on I_k. Its centered likelihood needs no center, since a sum of
squares about a mean is a mean of squared differences, and its size is the sum of all entries of Z_k:

    -2 log L = sum_k < D_k / 2 + ln|S_k| J, Z_k > + const        D_k,ij = (x_i - x_j).T S_k^-1 (x_i - x_j),  J all ones

which is linear in Z. Given covariances S_k, Z is relaxed to semidefinite matrices >= 0 with tr Z_k = 1 and rows that
add up to 1 over all clusters; rows go to the cluster with the largest sum; covariances are estimated again; until
labels repeat. The first labels are those of the relaxation of k-means (S_k alike, Z = sum_k Z_k), rounded by k-means on
its leading eigenvectors.

The likelihood is that of labels (no mixing weights). The labels can start EM, which adds those:
``GaussianMixture(K, init=LikelihoodAdjustedSDP(K).fit_predict(X))``. Centers are gone, covariances are not: where the
k-means program cuts long clusters across, as two side by side, the covariances of its parts are wrong and stay so.

Source: Zhuang, Chen and Yang, arXiv:2209.15097; k-means: Peng and Wei, SIAM J. Optim. 18 (2007). Programs are solved by
alternating directions here, each with a bound of its optimum.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from mixtura.core.errors import OptionError
from mixtura.density._checks import check_number, check_whole_number, random_numbers
from mixtura.density._init import check_responsibilities
from mixtura.density._membership import Relaxed, solve
from mixtura.density._tables import as_numpy, as_table

Floats = NDArray[np.floating]
Labels = NDArray[np.intp]


class LikelihoodAdjustedSDP(ClusterMixin, BaseEstimator):
    """Clusters of Gaussian shape, each with its own covariance, by semidefinite programs.

    A program takes a second for 120 rows and grows with the cube of their number, so more than ``max_rows`` are
    clustered by a random part of them; the others go to the likeliest cluster.

    Args:
        n_clusters: K.
        init: "kmeans-sdp", or labels (N,) to start from.
        max_iter: programs at most.
        reg_covar: added to the diagonal of covariances.
        max_rows: rows that the programs see at most.
        solver_max_iter: iterations of a program at most.
        solver_tol: relative error of the matrices at which a program ends.
        random_state: seed of the rows that are seen and of k-means on eigenvectors.

    Attributes:
        labels_: cluster of each row, (N,).
        means_: (K, D)
        covariances_: (K, D, D)
        objective_: -2 log likelihood of the labels of the rows seen, less N D ln 2 pi; the lowest of all iterations.
        bound_: of the last program: given its covariances no labels have a lower objective.
        n_iter_: programs solved.
        converged_: whether labels repeated.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        init: Any = "kmeans-sdp",
        max_iter: int = 20,
        reg_covar: float = 1e-6,
        max_rows: int = 300,
        solver_max_iter: int = 2000,
        solver_tol: float = 1e-3,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.reg_covar = reg_covar
        self.max_rows = max_rows
        self.solver_max_iter = solver_max_iter
        self.solver_tol = solver_tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Find clusters.

        Args:
            X: (N, D).
            y: ignored.

        Raises:
            OptionError: naming the argument, or if there are fewer rows than clusters.
        """
        data_ND = validate_data(self, as_table(X), dtype=np.float64)
        N = len(data_ND)
        K, everything = self._check_options(N), self.max_rows >= N
        rng = random_numbers(self.random_state)
        seen = np.arange(N) if everything else np.sort(rng.choice(N, self.max_rows, replace=False))
        if isinstance(self.init, str):
            labels = kmeans_sdp(data_ND[seen], K, self.solver_max_iter, self.solver_tol, rng)
        else:
            labels = check_responsibilities(self.init, N, K)[seen]
        self._alternate(data_ND[seen], labels)
        if not everything:
            self.labels_ = self.predict(data_ND)
        return self

    def _alternate(self, data_ND: Floats, labels_N: Labels) -> None:
        """Programs and covariances by turns; the best labels are kept."""
        K, state, visited = self.n_clusters, None, set()
        means_KD, covariances_KDD = moments(data_ND, labels_N, K, self.reg_covar)
        best, self.n_iter_, self.converged_ = (np.inf, labels_N, means_KD, covariances_KDD), 0, False
        while True:
            score = objective(data_ND, labels_N, means_KD, covariances_KDD)
            if score < best[0]:
                best = (score, labels_N, means_KD, covariances_KDD)
            self.converged_ = labels_N.tobytes() in visited
            if self.converged_ or self.n_iter_ == self.max_iter:
                break
            visited.add(labels_N.tobytes())
            found = self._solve(likelihood_costs(data_ND, covariances_KDD), state)
            labels_N, state, self.bound_ = found.Z_GNN.sum(2).argmax(0), found.state, found.bound
            means_KD, covariances_KDD = moments(data_ND, labels_N, K, self.reg_covar, covariances_KDD)
            self.n_iter_ += 1
        self.objective_, self.labels_, self.means_, self.covariances_ = best
        if not self.converged_:
            warnings.warn(f"labels still changed after max_iter={self.max_iter} programs", ConvergenceWarning, 3)

    def _solve(self, costs_KNN: Floats, state: Any) -> Relaxed:
        ones_K = np.ones(len(costs_KNN))
        return solve(costs_KNN, ones_K, max_iter=self.solver_max_iter, tol=self.solver_tol, state=state)

    def predict(self, X: Any) -> Labels:
        """The likeliest cluster of each row, (N,)."""
        check_is_fitted(self)
        data_ND = validate_data(self, as_table(X), dtype=np.float64, reset=False)
        return _losses(data_ND, self.means_, self.covariances_).argmin(0)

    def _check_options(self, N: int) -> int:
        K = check_whole_number("n_clusters", self.n_clusters, 1)
        for name in ("max_iter", "max_rows", "solver_max_iter"):
            check_whole_number(name, getattr(self, name), 1)
        check_number("reg_covar", self.reg_covar, 0)
        check_number("solver_tol", self.solver_tol, 0)
        if isinstance(self.init, str) and self.init != "kmeans-sdp":
            raise OptionError(f"init must be 'kmeans-sdp' or labels, got {self.init!r}")
        if min(N, self.max_rows) < K:
            raise OptionError(f"n_clusters={K} is more than the rows of X (n_samples={N}) or max_rows={self.max_rows}")
        return K


def kmeans_sdp(X: Any, n_clusters: int, max_iter: int = 2000, tol: float = 1e-3, random_state: Any = None) -> Labels:
    """Labels by the semidefinite relaxation of k-means, rounded by k-means on its leading eigenvectors.

    Args:
        X: (N, D).
        n_clusters: K.
        max_iter: iterations at most.
        tol: relative error of the matrix at which the program ends.
        random_state: seed of k-means.

    Returns:
        (N,)
    """
    data_ND, K = np.asarray(as_numpy(X), dtype=np.float64), n_clusters
    if K == 1:
        return np.zeros(len(data_ND), np.intp)
    costs = squared_differences(data_ND)[None] / 2
    found = solve(costs, np.array([float(K)]), max_iter=max_iter, tol=tol)
    _, vectors = np.linalg.eigh(found.Z_GNN[0])
    rng = random_numbers(random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # rows that are the same: fewer clusters than asked for
        return KMeans(K, n_init=10, random_state=rng).fit_predict(vectors[:, -K:]).astype(np.intp)


def squared_differences(data_ND: Floats) -> Floats:
    """Squared distances of all pairs, (N, N)."""
    centered = data_ND - data_ND.mean(0)
    squares = (centered**2).sum(1)
    return (squares[:, None] + squares - 2 * centered @ centered.T).clip(0)


def likelihood_costs(data_ND: Floats, covariances_KDD: Floats) -> Floats:
    """D_k / 2 + ln|S_k| J, (K, N, N): their products with memberships add up to -2 log likelihood."""
    factors = np.linalg.cholesky(covariances_KDD)
    logs_K = 2 * np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    white = [squared_differences(np.linalg.solve(factor, data_ND.T).T) for factor in factors]
    return np.stack(white) / 2 + logs_K[:, None, None]


def moments(
    data_ND: Floats, labels_N: Labels, K: int, reg_covar: float, before_KDD: Floats | None = None
) -> tuple[Floats, Floats]:
    """Means and covariances within clusters; a cluster without rows keeps its covariance, or has that of all rows."""
    D = data_ND.shape[1]
    overall = np.cov(data_ND.T, bias=True).reshape(D, D)
    means_KD, covariances_KDD = np.tile(data_ND.mean(0), (K, 1)), np.tile(overall, (K, 1, 1))
    for k in range(K):
        mine = data_ND[labels_N == k]
        if len(mine):
            means_KD[k] = mine.mean(0)
            covariances_KDD[k] = (mine - means_KD[k]).T @ (mine - means_KD[k]) / len(mine)
        elif before_KDD is not None:
            covariances_KDD[k] = before_KDD[k] - reg_covar * np.eye(D)
    return means_KD, covariances_KDD + reg_covar * np.eye(D)


def objective(data_ND: Floats, labels_N: Labels, means_KD: Floats, covariances_KDD: Floats) -> float:
    """-2 log likelihood of labels, less N D ln 2 pi."""
    return float(_losses(data_ND, means_KD, covariances_KDD)[labels_N, np.arange(len(data_ND))].sum())


def _losses(data_ND: Floats, means_KD: Floats, covariances_KDD: Floats) -> Floats:
    """-2 log density of rows in each cluster, less D ln 2 pi, (K, N)."""
    factors = np.linalg.cholesky(covariances_KDD)
    logs_K = 2 * np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    white = np.linalg.solve(factors, (data_ND - means_KD[:, None]).swapaxes(1, 2))
    return (white**2).sum(1) + logs_K[:, None]
