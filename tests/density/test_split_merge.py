"""Splitting and merging: marginal likelihoods, moves that undo each other, labels that hold, numbers that are found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import invwishart, multivariate_t, norm
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from density.tables import degenerate_tables
from mixtura.core.errors import MixturaError, OptionError, ShapeError
from mixtura.density import NIW, SplitMergeMixture
from mixtura.density._em import moments_of
from mixtura.density._partition import (
    Judge,
    Partition,
    _log_ratios,
    group_statistics,
    joined,
    log_marginals,
    merge,
    split,
)
from mixtura.density._rows import Rows

PRIOR = NIW(kappa=0.5, nu=5.0, psi=np.array([[2.0, 0.3, 0], [0.3, 1, 0.1], [0, 0.1, 3]]), mean=np.array([0.5, 0, -1]))
X = np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 0.5]
BLOBS, TRUTH = make_blobs(400, 3, centers=5, random_state=3)


def marginal(X, prior=PRIOR):
    return log_marginals(group_statistics(Rows(X), np.zeros(len(X), int), 1), prior)[0]


def posterior(X, prior=PRIOR):
    """The prior once rows are known."""
    n, mean = len(X), X.mean(0)
    kappa = prior.kappa + n
    scatter = (X - mean).T @ (X - mean)
    psi = prior.psi + scatter + prior.kappa * n / kappa * np.outer(mean - prior.mean, mean - prior.mean)
    return NIW(kappa, prior.nu + n, psi, (prior.kappa * prior.mean + n * mean) / kappa)


def test_marginal_is_the_chain_of_predictive_densities():
    """Each row given those before it has a Student t density."""
    total = 0.0
    for row in range(len(X)):
        now = posterior(X[:row]) if row else PRIOR
        freedom = now.nu - 2
        shape = now.psi * (now.kappa + 1) / (now.kappa * freedom)
        total += multivariate_t(now.mean, shape, freedom).logpdf(X[row])
    assert marginal(X) == pytest.approx(total, rel=1e-10)
    assert marginal(X) == pytest.approx(marginal(X[:15]) + marginal(X[15:], posterior(X[:15])), rel=1e-10)


def test_marginal_is_the_integral_over_parameters():
    """One column, where the integral can be done on a grid of means and log variances."""
    prior, x = NIW(0.7, 3.0, np.array([[1.5]]), np.array([0.3])), np.array([[0.2], [1.1], [-0.4]])
    mean, log_variance = np.linspace(-30, 30, 3001)[:, None], np.linspace(-7, 12, 800)
    deviation = np.exp(0.5 * log_variance)
    likelihood = np.prod([norm(mean, deviation).pdf(value) for value in x.ravel()], axis=0)
    own = norm(0.3, deviation / np.sqrt(0.7)).pdf(mean) * invwishart(3, 1.5).pdf(deviation**2)
    found = np.trapezoid(np.trapezoid(likelihood * own * deviation**2, log_variance), mean.ravel())
    assert marginal(x, prior) == pytest.approx(np.log(found), abs=1e-4)


def test_statistics_of_groups_are_those_of_moments_and_join():
    weights, groups = np.random.default_rng(1).integers(1, 4, 40), np.random.default_rng(2).integers(0, 4, 40)
    rows = Rows(X, weights)
    ours, slow = group_statistics(rows, groups, 5), moments_of(rows, groups, 5, diagonal=False)
    for name in ("count_K", "second"):
        np.testing.assert_allclose(getattr(ours, name), getattr(slow, name), atol=1e-10)
    np.testing.assert_allclose(ours.reference_KD[:4], slow.reference_KD[:4])
    pair = joined(ours, np.array([0]), np.array([2]))
    both = group_statistics(Rows(X[np.isin(groups, [0, 2])], weights[np.isin(groups, [0, 2])]), np.zeros(19, int), 1)
    for name in ("count_K", "second", "reference_KD"):
        np.testing.assert_allclose(getattr(pair, name), getattr(both, name), rtol=1e-10)
    heavy = group_statistics(Rows(np.repeat(X, weights, 0)), np.repeat(groups, weights), 5)
    np.testing.assert_allclose(log_marginals(ours, PRIOR), log_marginals(heavy, PRIOR), rtol=1e-10)


def test_ratios_are_written_out_and_those_of_split_and_merge_are_inverse():
    groups = np.arange(40) % 3
    judge = Judge(Rows(X), PRIOR, alpha=2.5, least=0)
    found = _log_ratios(judge, Partition(groups, 3))
    one, other = X[groups == 0], X[groups == 2]
    log_H = np.log(2.5) + gammaln(len(one)) + marginal(one) + gammaln(len(other)) + marginal(other)
    log_H -= gammaln(len(one) + len(other)) + marginal(np.vstack([one, other]))
    assert found[0, 2] == pytest.approx(log_H, rel=1e-10)
    after = Partition(np.where(groups == 2, 0, groups), 2)
    assert judge.log_joint(Partition(groups, 3)) - judge.log_joint(after) == pytest.approx(log_H, rel=1e-10)


def test_a_merge_lowers_the_number_and_a_split_raises_it_and_rows_are_kept():
    rng = np.random.RandomState(0)
    judge = Judge(Rows(BLOBS), NIW(psi=1.0).resolve(BLOBS.mean(0), np.cov(BLOBS.T), 1), 1.0, 5)
    whole = Partition(np.zeros(400, np.intp), 1)
    halved = split(judge, whole, rng)
    assert halved.K == 2
    assert (np.bincount(halved.groups_N) > 0).all()
    shards = Partition(2 * TRUTH + np.random.default_rng(0).integers(0, 2, 400), 10)
    mended = merge(judge, shards, rng)
    assert mended.K == 5
    assert adjusted_rand_score(TRUTH, mended.groups_N) == 1
    before = group_statistics(judge.rows, TRUTH, 5)
    after = group_statistics(judge.rows, mended.groups_N, 5)
    order = [mended.groups_N[k == TRUTH][0] for k in range(5)]
    np.testing.assert_allclose(after.reference_KD[order], before.reference_KD, rtol=1e-12)
    np.testing.assert_allclose(after.count_K[order], before.count_K)


@pytest.mark.parametrize("start", [1, 3, 12])
def test_the_number_of_clusters_is_found_from_any_start(start):
    ours = SplitMergeMixture(start, random_state=0).fit(BLOBS)
    assert ours.n_components_ == 5
    assert adjusted_rand_score(TRUTH, ours.labels_) > 0.98
    assert ours.sizes_[-1] == 5
    assert ours.converged_
    assert ours.mixture_.weights_.sum() == pytest.approx(1)


def test_one_cluster_stays_one():
    ours = SplitMergeMixture(6, random_state=0).fit(np.random.default_rng(0).normal(size=(300, 3)))
    assert ours.n_components_ == 1


def test_larger_groups_are_expected_where_psi_is_larger():
    sizes = [SplitMergeMixture(prior=NIW(psi=psi), random_state=0).fit(BLOBS).n_components_ for psi in (1.0, 1e4)]
    assert sizes[0] == 5 > sizes[1]


def test_labelled_rows_keep_their_class_and_new_classes_get_new_numbers():
    names = np.array([7, 2, 40, -1, -1])
    known = np.random.default_rng(0).uniform(size=400) < 0.3
    y = np.where(known, names[TRUTH], -1)
    ours = SplitMergeMixture(random_state=0).fit(BLOBS, y)
    assert ours.classes_.tolist() == [2, 7, 40, 41, 42]
    assert (ours.labels_[y >= 0] == y[y >= 0]).all()
    assert (ours.predict(BLOBS)[TRUTH < 3] == names[TRUTH[TRUTH < 3]]).mean() > 0.98
    wrong = np.where(np.arange(400) < 40, 3, y)  # contradicting the clusters: they hold all the same
    stubborn = SplitMergeMixture(random_state=0).fit(BLOBS, wrong)
    assert (stubborn.labels_[wrong >= 0] == wrong[wrong >= 0]).all()


def test_all_labels_given_are_posterior_estimates_of_the_classes():
    prior = NIW(psi=1.0).resolve(BLOBS.mean(0), np.cov(BLOBS.T), 1)
    ours = SplitMergeMixture(5, prior=NIW(psi=1.0), random_state=0).fit(BLOBS, TRUTH)
    assert ours.n_components_ == 5
    assert (ours.labels_ == TRUTH).all()
    np.testing.assert_allclose(ours.mixture_.weights_, np.bincount(TRUTH) / 400)
    for k in range(5):
        own = posterior(BLOBS[k == TRUTH], prior)
        np.testing.assert_allclose(ours.mixture_.means_[k], own.mean, rtol=1e-9)
        np.testing.assert_allclose(ours.mixture_.covariances_[k], own.psi / (own.nu + 3 + 2), rtol=1e-8)


def test_a_class_that_swallowed_another_lets_it_go():
    y = np.where(TRUTH == 0, 0, -1)
    ours = SplitMergeMixture(1, random_state=0).fit(BLOBS, y)
    assert ours.n_components_ == 5
    assert (ours.labels_[TRUTH == 0] == 0).all()


def test_starts_compete():
    one = SplitMergeMixture(9, n_init=1, max_iter=1, random_state=0).fit(BLOBS)
    several = SplitMergeMixture(9, n_init=4, max_iter=1, random_state=0).fit(BLOBS)
    assert several.log_joint_ >= one.log_joint_
    assert len(one.sizes_) == one.n_iter_ == 1
    assert not one.converged_


def test_known_classes_on_digits():
    images, truth = load_digits(return_X_y=True)
    features = normalize(PCA(20, random_state=0).fit_transform(images))
    labelled = (truth < 5) & (np.random.default_rng(0).uniform(size=len(truth)) < 0.5)
    prior = NIW(kappa=1e-4, nu=21, psi=0.005)
    ours = SplitMergeMixture(6, prior=prior, random_state=0).fit(features, np.where(labelled, truth, -1))
    assert 8 <= ours.n_components_ <= 13
    assert adjusted_rand_score(truth[~labelled], ours.labels_[~labelled]) > 0.6


def test_degenerate_rows_are_fitted():
    same = SplitMergeMixture(4, random_state=0).fit(np.ones((30, 2)))
    assert same.n_components_ == 1
    assert np.isfinite(same.mixture_.covariances_).all()
    constant = SplitMergeMixture(random_state=0).fit(np.c_[BLOBS, np.full(400, 3.0)])
    assert constant.n_components_ == 5
    assert SplitMergeMixture().fit([[1.0, 2.0]]).n_components_ == 1
    weights = np.arange(400) % 2
    far = np.where(weights[:, None] > 0, BLOBS, 1e6)
    half = SplitMergeMixture(random_state=0).fit(far, sample_weight=weights)
    assert half.n_components_ == 5
    assert half.labels_.shape == (400,)


@settings(max_examples=25)
@given(degenerate_tables(), st.integers(1, 5), st.booleans())
def test_any_finite_table_gives_finite_parameters(table, start, labelled):
    X = np.nan_to_num(table)
    y = np.where(np.arange(len(X)) % 3 == 0, 0, -1) if labelled else None
    try:
        ours = SplitMergeMixture(start, max_iter=3, random_state=0).fit(X, y)
    except MixturaError as error:
        assert len(str(error)) > 20  # noqa: PT017
        return
    for value in (ours.mixture_.means_, ours.mixture_.covariances_, ours.predict_proba(X), ours.log_joint_):
        assert np.isfinite(value).all()
    assert len(ours.classes_) == ours.n_components_ <= max(len(X), start)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(OptionError, match="n_components_init=2 is less than the 5 classes in y"):
        SplitMergeMixture(2).fit(BLOBS, TRUTH)
    with pytest.raises(ShapeError, match=r"y must have one column, got shape \(400, 2\)"):
        SplitMergeMixture().fit(BLOBS, np.ones((400, 2)))
    with pytest.raises(OptionError, match="alpha must be a number of at least"):
        SplitMergeMixture(alpha=0).fit(BLOBS)
    with pytest.raises(OptionError, match="prior needs kappa > 0 here, got 0"):
        SplitMergeMixture(prior=NIW(kappa=0)).fit(BLOBS)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        SplitMergeMixture().fit(np.where(BLOBS > 0, BLOBS, np.nan))
    for value, seen in ((0.5, "0.5"), (np.nan, "nan"), (-2, "-2"), ("a", "'")):
        y = [value if i == 7 else int(k) for i, k in enumerate(TRUTH)]
        with pytest.raises(OptionError, match=f"y must be whole numbers from 0, or -1 where unknown, got {seen}"):
            SplitMergeMixture(random_state=0).fit(BLOBS, y)


def test_frames_come_in_without_a_word():
    import pandas

    frame = pandas.DataFrame(BLOBS, columns=[f"x{i}" for i in range(BLOBS.shape[1])])
    ours = SplitMergeMixture(random_state=0).fit(frame)
    assert np.array_equal(ours.labels_, SplitMergeMixture(random_state=0).fit(BLOBS).labels_)
    assert np.array_equal(ours.predict(frame), ours.labels_)
    weights = np.arange(len(BLOBS)) % 3
    assert ours.score(frame, sample_weight=weights) == pytest.approx(ours.score(frame.loc[frame.index.repeat(weights)]))
    with pytest.raises(ValueError, match="sample_weight"):
        ours.score(frame, sample_weight=-weights)
