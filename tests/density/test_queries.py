"""What a fitted mixture can be asked: marginals, conditionals, samples, criteria; and parameters given by hand."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal

from density.tables import rows, with_holes
from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import FAMILIES, GaussianMixture, SingularComponentError


@pytest.fixture(scope="module")
def fitted():
    return GaussianMixture(3, random_state=0).fit(rows()[0])


def test_density_is_that_of_scipy(fitted):
    X, _ = rows(20, seed=9)
    parts = zip(fitted.weights_, fitted.means_, fitted.covariances_, strict=True)
    expected = sum(weight * multivariate_normal.pdf(X, mean, covariance) for weight, mean, covariance in parts)
    np.testing.assert_allclose(fitted.score_samples(X), np.log(expected), rtol=1e-10)
    assert fitted.score(X) == pytest.approx(np.log(expected).mean(), rel=1e-10)


@pytest.mark.parametrize("given", [[0], [2, 1], []])
@pytest.mark.parametrize("family", ["VVV", "VVI", "EVE"])
def test_conditional_times_marginal_is_joint(given, family):
    X, _ = rows()
    ours = GaussianMixture(3, covariance=family, random_state=0).fit(X)
    rest = [column for column in range(3) if column not in given]
    joint = ours.score_samples(X[:30])
    marginal = ours.marginal(given).score_samples(X[:30][:, given]) if given else 0.0
    conditional = ours.conditional(X[:30][:, given], given)
    assert len(conditional) == 30
    np.testing.assert_allclose(marginal + conditional.score_samples(X[:30][:, rest]), joint, rtol=1e-10)


def test_conditional_moments_are_integrals(fitted):
    x = rows()[0][3]
    one = fitted.conditional(x[None, [0, 2]], [0, 2])

    def moment(power):
        return quad(lambda y: y**power * np.exp(one.score_samples([[y]])[0]), -40, 60, limit=400)[0]

    assert moment(0) == pytest.approx(1, abs=1e-6)
    assert one.mean()[0, 0] == pytest.approx(moment(1), rel=1e-6)
    assert one.covariance()[0, 0, 0] == pytest.approx(moment(2) - moment(1) ** 2, rel=1e-5)


def test_draws_of_a_conditional_have_its_moments(fitted):
    batch = fitted.conditional(np.repeat(rows()[0][[3]][:, [0]], 40_000, 0), [0])
    draws = batch.sample(random_state=0)
    np.testing.assert_allclose(draws.mean(0), batch.mean()[0], atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), batch.covariance()[0], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_marginals_of_every_family_can_be_fitted_on(family):
    X, _ = rows()
    ours = GaussianMixture(3, covariance=family, random_state=0).fit(X)
    part = ours.marginal([2, 0])
    np.testing.assert_array_equal(part.covariances_, ours.covariances_[:, [2, 0]][:, :, [2, 0]])
    before = part.score(X[:, [2, 0]])
    assert part.set_params(warm_start=True).fit(X[:, [2, 0]]).score(X[:, [2, 0]]) >= before - 1e-6


def test_samples_have_the_moments_of_the_mixture(fitted):
    X, component = fitted.set_params(random_state=3).sample(50_000)
    assert (np.diff(component) >= 0).all()
    np.testing.assert_allclose(np.bincount(component) / 50_000, fitted.weights_, atol=0.01)
    for k in range(3):
        scale = np.sqrt(np.diag(fitted.covariances_[k]))
        np.testing.assert_allclose(X[component == k].mean(0) / scale, fitted.means_[k] / scale, atol=0.05)
        np.testing.assert_allclose(np.cov(X[component == k].T), fitted.covariances_[k], rtol=0.1, atol=0.5)


def test_criteria_are_what_they_say(fitted):
    X, _ = rows()
    total = fitted.score_samples(X).sum()
    assert fitted.n_parameters_ == 2 + 3 * 3 + 3 * 6
    assert fitted.bic(X) == pytest.approx(-2 * total + 29 * np.log(200))
    assert fitted.aic(X) == pytest.approx(-2 * total + 58)
    certainty = np.log(fitted.predict_proba(X).max(1)).sum()
    assert fitted.icl(X) == pytest.approx(fitted.bic(X) - 2 * certainty)


def test_a_mixture_can_be_written_down_and_asked():
    ours = GaussianMixture.from_parameters([0.25, 0.75], [[0, 0], [5, 5]], [np.eye(2), 2 * np.eye(2)])
    assert ours.predict([[0.1, 0], [4, 5]]).tolist() == [0, 1]
    assert ours.sample(8)[0].shape == (8, 2)
    variances = GaussianMixture.from_parameters([0.25, 0.75], [[0, 0], [5, 5]], [[1, 1], [2, 2]])
    np.testing.assert_allclose(variances.score_samples([[1, 2]]), ours.score_samples([[1, 2]]))
    assert variances.covariance == "VVI"


def test_wrong_questions_are_refused(fitted):
    X, _ = rows()
    with pytest.raises(OptionError, match=r"given must be indices of columns in 0 .. 2, got \[3\]"):
        fitted.conditional(X[:, [0]], [3])
    with pytest.raises(OptionError, match="columns must not name a column twice"):
        fitted.marginal([1, 1])
    with pytest.raises(ShapeError, match=r"X_given must be \(N, 2\), got \(200, 3\)"):
        fitted.conditional(X, [0, 1])
    with pytest.raises(OptionError, match="X_given must be finite; for missing values use impute"):
        fitted.conditional(with_holes(X)[:, [0]], [0])
    with pytest.raises(OptionError, match="n_samples must be a whole number of at least 1"):
        fitted.sample(0)
    with pytest.raises(ShapeError, match=r"Y must be \(200, 2\), got \(200, 3\)"):
        fitted.conditional(X[:, [0]], [0]).score_samples(X)
    with pytest.raises(ShapeError, match="weights, means and covariances must be"):
        GaussianMixture.from_parameters([1], [[0, 0]], np.eye(2))
    with pytest.raises(OptionError, match="weights must not be negative and sum to 1"):
        GaussianMixture.from_parameters([0.5], [[0, 0]], [np.eye(2)])
    with pytest.raises(SingularComponentError, match="component 0"):
        GaussianMixture.from_parameters([1], [[0, 0]], [np.ones((2, 2))])
    noisy = GaussianMixture(2, noise_component=True, random_state=0).fit(X)
    for question in (
        noisy.sample,
        lambda: noisy.conditional(X[:, [0]], [0]),
        lambda: noisy.marginal([0]),
        noisy.to_sklearn,
    ):
        with pytest.raises(OptionError, match="noise component"):
            question()


def test_questions_without_an_answer_are_refused(fitted):
    X, _ = rows()
    with pytest.raises(OptionError, match=r"columns must be indices of columns in 0 \.\. 2, got 1"):
        fitted.marginal(1)
    with pytest.raises(OptionError, match="columns must name at least one, got none"):
        fitted.marginal([])
    with pytest.raises(OptionError, match="given must leave a column to ask for, got all 3"):
        fitted.conditional(X, [0, 2, 1])
    batch = fitted.conditional(X[:, :2], [0, 1])
    with pytest.raises(OptionError, match="Y must be finite, got NaN"):
        batch.score_samples(np.full((200, 1), np.nan))
    with pytest.raises(OptionError, match="random_state must be"):
        batch.sample("a")
    nothing = fitted.conditional(np.empty((2, 0)), [])
    assert np.allclose(nothing.mean(), fitted.weights_ @ fitted.means_)
