"""Missing values and noise of each row: exact EM, against densities written out row by row."""

import copy

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from density.tables import responsibilities, rows, same, with_holes
from mixtura.core.errors import MixturaWarning, OptionError, ShapeError
from mixtura.density import FAMILIES, GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
OPTIONS = {"init": responsibilities(), "tol": 0, "reg_covar": 0}


def slow_step(X, noise, weights, means, covariances):
    """One EM step of full covariances, row by row; and the log likelihood before it."""
    total, counts = 0.0, np.zeros(len(weights))
    firsts, seconds = np.zeros_like(means), np.zeros_like(covariances)
    moments = []
    for x, own in zip(X, noise, strict=True):
        o = np.flatnonzero(~np.isnan(x))
        joint, posteriors = [], []
        for weight, mean, covariance in zip(weights, means, covariances, strict=True):
            observed = covariance[np.ix_(o, o)] + own[np.ix_(o, o)]
            joint.append(weight * multivariate_normal.pdf(x[o], mean[o], observed) if len(o) else weight)
            gain = covariance[:, o] @ np.linalg.inv(observed)
            posteriors.append((mean + gain @ (x[o] - mean[o]), covariance - gain @ covariance[o]))
        total += np.log(sum(joint))
        moments.append((np.array(joint) / sum(joint), posteriors))
    for shares, posteriors in moments:
        for k, (mean, _) in enumerate(posteriors):
            counts[k] += shares[k]
            firsts[k] += shares[k] * mean
    means = firsts / counts[:, None]
    for shares, posteriors in moments:
        for k, (mean, spread) in enumerate(posteriors):
            seconds[k] += shares[k] * (np.outer(mean - means[k], mean - means[k]) + spread)
    return total / len(X), counts / len(X), means, seconds / counts[:, None, None]


@pytest.mark.parametrize("kind", ["missing", "noise", "both", "noise of columns"])
def test_a_step_is_that_of_the_slow_version(kind):
    X, _ = rows()
    generator = np.random.default_rng(4)
    noise = np.zeros((200, 3, 3))
    if kind != "missing":
        roots = generator.normal(size=(200, 3, 3))
        noise = roots @ roots.swapaxes(1, 2)
    if kind == "noise of columns":
        noise = noise * np.eye(3)
    X = with_holes(X) if kind in ("missing", "both") else X
    start = GaussianMixture(3, max_iter=0, **OPTIONS).fit(X)
    score, *expected = slow_step(X, noise, start.weights_, start.means_, start.covariances_)
    given = np.diagonal(noise, axis1=1, axis2=2) if kind == "noise of columns" else noise
    ours = GaussianMixture(3, max_iter=1, **OPTIONS).fit(X, noise_cov=given)
    assert ours.lower_bound_ == pytest.approx(score, rel=1e-10)
    for found, value in zip((ours.weights_, ours.means_, ours.covariances_), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_never_falls(family):
    X, _ = rows()
    ours = GaussianMixture(3, covariance=family, max_iter=40, **OPTIONS).fit(with_holes(X))
    assert np.diff(ours.lower_bounds_).min() > -1e-9
    noisy = GaussianMixture(3, covariance=family, max_iter=40, **OPTIONS).fit(X, noise_cov=np.full(X.shape, 0.3))
    assert np.diff(noisy.lower_bounds_).min() > -1e-9


def test_where_nothing_is_missing_the_path_is_the_plain_one():
    X, _ = rows()
    plain = GaussianMixture(3, max_iter=9, **OPTIONS).fit(X)
    silent = GaussianMixture(3, max_iter=9, **OPTIONS).fit(X, noise_cov=np.zeros(X.shape))
    for name in ("weights_", "means_", "covariances_"):
        assert np.array_equal(getattr(plain, name), getattr(silent, name))
    slightly = GaussianMixture(3, max_iter=9, **OPTIONS).fit(X, noise_cov=np.full(X.shape, 1e-13))
    same(plain, slightly, rtol=1e-8)


def test_a_row_without_any_value_says_nothing():
    X, _ = rows()
    more = np.vstack([X, np.full((1, 3), np.nan)])
    begun = GaussianMixture(3, random_state=0).fit(X)
    begun.set_params(warm_start=True, max_iter=1000, tol=1e-13, reg_covar=0)
    without, with_it = (copy.deepcopy(begun).fit(table) for table in (X, more))
    same(without, with_it, rtol=1e-4)


def test_an_empty_column_leaves_the_others_alone():
    X, _ = rows()
    empty = np.c_[X, np.full(len(X), np.nan)]
    with pytest.warns(MixturaWarning, match=r"columns \[3\] of X hold no value"):
        ours = GaussianMixture(3, max_iter=6, init=OPTIONS["init"], tol=0).fit(empty)
    alone = GaussianMixture(3, max_iter=6, init=OPTIONS["init"], tol=0).fit(X)
    np.testing.assert_allclose(ours.means_[:, :3], alone.means_, rtol=1e-9)
    np.testing.assert_allclose(ours.covariances_[:, :3, :3], alone.covariances_, rtol=1e-8, atol=1e-10)
    assert np.isfinite(ours.covariances_).all()


def test_imputed_means_are_conditional_means():
    X, _ = rows()
    holes = with_holes(X)
    ours = GaussianMixture(3, random_state=0).fit(X)
    filled = ours.impute(holes)
    assert np.array_equal(filled[~np.isnan(holes)], holes[~np.isnan(holes)])
    for i in (0, 7, 31):
        known = np.flatnonzero(~np.isnan(holes[i]))
        if 0 < len(known) < 3:
            expected = ours.conditional(holes[[i]][:, known], known.tolist()).mean()[0]
            np.testing.assert_allclose(filled[i, np.isnan(holes[i])], expected, rtol=1e-10)
    np.testing.assert_allclose(ours.impute(np.full((1, 3), np.nan))[0], ours.weights_ @ ours.means_, rtol=1e-10)


def test_imputed_draws_have_the_distribution_of_the_data():
    X, _ = rows()
    ours = GaussianMixture(3, random_state=0).fit(X)
    data, _ = ours.set_params(random_state=1).sample(20_000)
    filled = ours.impute(with_holes(data, 0.5), how="sample", random_state=2)
    spread = np.sqrt(np.diag(np.cov(data.T)))
    np.testing.assert_allclose(filled.mean(0) / spread, data.mean(0) / spread, atol=0.03)
    np.testing.assert_allclose(np.cov(filled.T) / np.outer(spread, spread), np.corrcoef(data.T), atol=0.05)
    meek = ours.impute(with_holes(data, 0.5))
    assert (np.cov(meek.T).diagonal() < 0.95 * spread**2).all()
    with pytest.raises(OptionError, match="how must be 'mean' or 'sample', got 'median'"):
        ours.impute(X, how="median")


def test_known_noise_is_taken_away():
    """Covariances are those of what lies behind the noise; rows under more noise count less."""
    generator = np.random.default_rng(0)
    truth = np.array([[1.0, 0.7], [0.7, 1.0]])
    clean = generator.multivariate_normal([0, 0], truth, 6000)
    level = generator.choice([0.0, 1.0, 3.0], size=(6000, 1)) * np.ones((1, 2))
    X = clean + level * generator.normal(size=clean.shape)
    ours = GaussianMixture(1, max_iter=500, tol=1e-9).fit(X, noise_cov=level**2)
    np.testing.assert_allclose(ours.covariances_[0], truth, atol=0.08)
    assert np.abs(np.cov(X.T) - truth).max() > 2


def test_scores_of_incomplete_rows_are_marginal_densities():
    X, _ = rows()
    ours = GaussianMixture(3, random_state=0).fit(X)
    holes = X.copy()
    holes[:, 1] = np.nan
    np.testing.assert_allclose(ours.score_samples(holes), ours.marginal([0, 2]).score_samples(X[:, [0, 2]]), rtol=1e-9)


def test_noise_of_a_wrong_form_is_refused():
    X, _ = rows()
    with pytest.raises(ShapeError, match=r"noise_cov must be \(200, 3\) or \(200, 3, 3\), got \(200,\)"):
        GaussianMixture(2).fit(X, noise_cov=np.ones(200))
    with pytest.raises(OptionError, match="positive semidefinite"):
        GaussianMixture(2).fit(X, noise_cov=-np.ones((200, 3)))
    with pytest.raises(OptionError, match="noise_cov must be finite"):
        GaussianMixture(2).fit(X, noise_cov=np.full((200, 3), np.nan))
