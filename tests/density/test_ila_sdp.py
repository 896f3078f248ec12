"""Clusters by semidefinite programs: against all partitions, with certificates."""

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import GaussianMixture, LikelihoodAdjustedSDP, kmeans_sdp
from mixtura.density._membership import lower_bound, positive_part, project, solve
from mixtura.density.ila_sdp import likelihood_costs, moments, objective, squared_differences


def stretched(N=45, apart=6.0, seed=0):
    """Three clusters of unequal shape and size in a plane."""
    generator = np.random.default_rng(seed)
    labels_N = np.repeat([0, 1, 2], [N // 2, N // 3, N - N // 2 - N // 3])
    scales = np.array([[3.0, 0.3], [0.3, 2.0], [0.5, 0.5]])
    centers = apart * np.array([[0.0, 0.0], [1.0, 0.6], [-1.0, 0.6]])
    return centers[labels_N] + scales[labels_N] * generator.normal(size=(N, 2)), labels_N


def memberships(labels_N, K):
    """Matrices of a partition, (K, N, N)."""
    on_KN = np.asarray(labels_N) == np.arange(K)[:, None]
    return on_KN[:, :, None] * on_KN[:, None] / on_KN.sum(1)[:, None, None]


def partitions(N, K):
    """Labels of all partitions into K clusters that are not empty."""
    return [labels for labels in itertools.product(range(K), repeat=N) if len(set(labels)) == K]


def covariances(K=3, D=2, seed=3):
    roots = np.random.default_rng(seed).normal(size=(K, D, D))
    return roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(D)


def test_products_with_memberships_are_the_likelihood():
    """For any labels and covariances, against densities of scipy."""
    X, _ = stretched()
    labels_N = np.random.default_rng(1).integers(0, 3, len(X))
    S = covariances()
    means = [X[labels_N == k].mean(0) for k in range(3)]
    expected = sum(-2 * multivariate_normal.logpdf(X[labels_N == k], means[k], S[k]).sum() for k in range(3))
    expected -= X.size * np.log(2 * np.pi)
    found = (likelihood_costs(X, S) * memberships(labels_N, 3)).sum()
    assert found == pytest.approx(expected, rel=1e-10)
    assert objective(X, labels_N, np.array(means), S) == pytest.approx(expected, rel=1e-10)


def test_memberships_satisfy_the_constraints():
    Z = memberships(stretched()[1], 3)
    same, _ = project(Z, np.ones(3), np.ones(45))
    np.testing.assert_allclose(same, Z, atol=1e-12)
    assert np.linalg.eigvalsh(Z).min() > -1e-12


@pytest.mark.parametrize("G", [1, 3])
def test_projection_is_the_nearest(G):
    """Against least squares on the equations, written out."""
    N, generator = 5, np.random.default_rng(G)
    M = generator.normal(size=(G, N, N))
    M = M + M.swapaxes(1, 2)
    traces, sums = generator.uniform(1, 2, G), generator.uniform(1, 2, N)
    rows, values = [], []
    for g in range(G):
        rows.append(np.concatenate([np.eye(N).ravel() * (h == g) for h in range(G)]))
        values.append(traces[g])
    for n in range(N):
        symmetric = np.outer(np.eye(N)[n], np.ones(N))
        rows.append(np.tile(((symmetric + symmetric.T) / 2).ravel(), G))
        values.append(sums[n])
    A = np.array(rows)
    expected = M.ravel() + np.linalg.pinv(A) @ (np.array(values) - A @ M.ravel())
    np.testing.assert_allclose(project(M, traces, sums)[0].ravel(), expected, atol=1e-10)


def test_positive_part_is_the_nearest():
    M = np.random.default_rng(0).normal(size=(2, 4, 4))
    M = M + M.swapaxes(1, 2)
    found = positive_part(M)
    assert np.linalg.eigvalsh(found).min() > -1e-12
    assert (found * (found - M)).sum((1, 2)) == pytest.approx(0, abs=1e-12)  # and the rest is negative
    assert np.linalg.eigvalsh(M - found).max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_below_all_partitions_and_meet_the_optimum(seed):
    X = np.random.default_rng(seed).normal(size=(8, 2))
    costs = likelihood_costs(X, covariances(K=2, seed=seed))
    best = min((costs * memberships(labels, 2)).sum() for labels in partitions(8, 2))
    found = solve(costs, np.ones(2), max_iter=5_000, tol=1e-6)
    assert found.converged
    assert found.bound <= best + 1e-9
    assert found.value == pytest.approx(found.bound, rel=1e-4, abs=1e-4)  # nothing is left between them
    np.testing.assert_allclose(found.Z_GNN.sum((0, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(np.trace(found.Z_GNN, axis1=1, axis2=2), 1, atol=1e-5)
    assert np.linalg.eigvalsh(found.Z_GNN).min() > -1e-5
    assert found.Z_GNN.min() >= 0
    generator = np.random.default_rng(seed)
    for _ in range(50):  # any multipliers bound the optimum
        plus, psd = generator.exponential(size=(2, 8, 8)), generator.normal(size=(2, 8, 8))
        plus, psd = plus + plus.swapaxes(1, 2), psd + psd.swapaxes(1, 2)
        assert lower_bound(costs, np.ones(2), plus, psd) <= best


@pytest.mark.parametrize(("N", "K", "seed", "optimum"), [(12, 2, 0, 1.5593016617), (15, 3, 1, 1.8336850145)])
def test_optima_are_those_of_an_interior_point_solver(N, K, seed, optimum):
    """Recorded from cvxpy 1.9.3 with Clarabel 0.11.1; the matrices differed by 3e-6 at most."""
    generator = np.random.default_rng(seed)
    X, roots = generator.normal(size=(N, 2)), generator.normal(size=(K, 2, 2))
    costs = likelihood_costs(X, roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(2))
    found = solve(costs, np.ones(K), max_iter=20_000, tol=1e-8)
    assert found.value == pytest.approx(optimum, abs=1e-5)
    assert optimum - 1e-4 < found.bound < optimum + 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_program_is_tight_for_clusters_apart(seed):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(9, 2)) + 6 * np.repeat([[0, 0], [0, 2], [2, 1]], 3, axis=0)
    costs = squared_differences(X)[None] / 2
    every = partitions(9, 3)
    scores = [(costs * memberships(labels, 3)).sum() for labels in every]
    best = int(np.argmin(scores))
    found = solve(costs, np.array([3.0]), max_iter=20_000, tol=1e-8)
    assert found.bound == pytest.approx(scores[best], rel=1e-4)
    np.testing.assert_allclose(found.Z_GNN[0], memberships(every[best], 3).sum(0), atol=1e-3)
    assert adjusted_rand_score(kmeans_sdp(X, 3, random_state=0), every[best]) == 1


def test_clusters_alike_are_the_kmeans_program():
    X = np.random.default_rng(0).normal(size=(12, 2))
    costs = squared_differences(X)[None] / 2
    one = solve(costs, np.array([3.0]), max_iter=5_000, tol=1e-6)
    three = solve(np.repeat(costs, 3, axis=0), np.ones(3), max_iter=5_000, tol=1e-6)
    assert three.value == pytest.approx(one.value, rel=1e-4)
    np.testing.assert_allclose(three.Z_GNN.sum(0), one.Z_GNN[0], atol=1e-3)


def test_clusters_apart_are_found_and_certified():
    X, labels_N = stretched()
    found = LikelihoodAdjustedSDP(3, random_state=0).fit(X)
    assert adjusted_rand_score(found.labels_, labels_N) == 1
    assert found.converged_
    expected = moments(X, found.labels_, 3, 1e-6)
    np.testing.assert_allclose(found.means_, expected[0])
    np.testing.assert_allclose(found.covariances_, expected[1])
    assert found.bound_ <= found.objective_ <= found.bound_ + 1  # nats, of 45 rows
    np.testing.assert_array_equal(found.predict(X), found.labels_)
    mixture = GaussianMixture(3, init=found.labels_, max_iter=500).fit(X)
    np.testing.assert_array_equal(mixture.predict(X), found.labels_)


def test_true_labels_stay():
    X, labels_N = stretched()
    found = LikelihoodAdjustedSDP(3, init=labels_N).fit(X)
    np.testing.assert_array_equal(found.labels_, labels_N)
    assert found.n_iter_ == 1


def test_the_objective_does_not_end_above_its_start():
    X, _ = stretched(N=24, apart=1.5, seed=1)
    for seed in range(2):
        start = np.random.default_rng(seed).integers(0, 3, len(X))
        found = LikelihoodAdjustedSDP(3, init=start).fit(X)
        assert found.objective_ <= objective(X, start, *moments(X, start, 3, 1e-6))
        assert found.objective_ == pytest.approx(objective(X, found.labels_, found.means_, found.covariances_))


def test_rotated_and_moved_rows_have_the_same_clusters():
    X, _ = stretched()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    one = LikelihoodAdjustedSDP(3, random_state=0).fit(X)
    two = LikelihoodAdjustedSDP(3, random_state=0).fit(X @ turn + 100)
    assert adjusted_rand_score(one.labels_, two.labels_) == 1
    assert two.objective_ == pytest.approx(one.objective_, rel=1e-6)


def test_many_rows_are_clustered_by_a_part():
    X, labels_N = stretched(N=300)
    found = LikelihoodAdjustedSDP(3, max_rows=40, random_state=0).fit(X)
    assert adjusted_rand_score(found.labels_, labels_N) > 0.85
    assert found.labels_.shape == (300,)


def test_it_says_when_it_was_stopped():
    X, _ = stretched(apart=1.0)
    start = np.random.default_rng(0).integers(0, 3, len(X))
    with pytest.warns(UserWarning, match="labels still changed after max_iter=1 programs"):
        assert not LikelihoodAdjustedSDP(3, init=start, max_iter=1).fit(X).converged_


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n_clusters": 0}, OptionError, "n_clusters must be a whole number of at least 1, got 0"),
        ({"n_clusters": 50}, OptionError, r"n_clusters=50 is more than the rows of X \(n_samples=45\)"),
        ({"init": "random"}, OptionError, "init must be 'kmeans-sdp' or labels, got 'random'"),
        ({"init": [0, 1]}, ShapeError, "init must be responsibilities"),
        ({"reg_covar": -1}, OptionError, "reg_covar must be a number of at least 0"),
        ({"solver_tol": np.nan}, OptionError, "solver_tol must be a number"),
        ({"max_rows": 2}, OptionError, "max_rows=2"),
    ],
)
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        LikelihoodAdjustedSDP(**{"n_clusters": 3, **options}).fit(stretched()[0])


def checks():
    """Every check but that of array-API input, which scikit-learn leaves to an environment variable."""
    for estimator, check in estimator_checks_generator(LikelihoodAdjustedSDP(3, max_rows=40, random_state=0)):
        name = check.func.__name__
        if name != "check_array_api_input":
            yield pytest.param(estimator, check, id=f"{name}-{'-'.join(map(str, check.keywords.values()))}")


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_checks(estimator, check):
    check(estimator)
