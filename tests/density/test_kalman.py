"""Exact posteriors of mixtures: against a grid, against the conditional of the joint, and against themselves."""

import numpy as np
import pytest
from scipy import stats

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import GaussianMixture, kalman_predict, kalman_update


def mixture(seed=0, K=3, D=2):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(K, D, D))
    weights = rng.dirichlet(np.ones(K))
    return GaussianMixture.from_parameters(
        weights, rng.normal(size=(K, D)) * 2, roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(D)
    )


def same(one, two, atol=1e-9):
    np.testing.assert_allclose(one.weights_, two.weights_, atol=atol)
    np.testing.assert_allclose(one.means_, two.means_, atol=atol)
    np.testing.assert_allclose(one.covariances_, two.covariances_, atol=atol)


def test_the_posterior_is_prior_times_likelihood_on_a_grid():
    prior, noise = mixture(D=1), 0.7
    Y = np.array([[1.0], [0.2], [1.9]])
    grid = np.linspace(-15, 15, 6001)[:, None]
    log = prior.score_samples(grid) + sum(stats.norm(2 * grid[:, 0], np.sqrt(noise)).logpdf(y[0]) for y in Y)
    density = np.exp(log - log.max())
    density /= density.sum() * 0.005
    posterior = kalman_update(prior, Y, [[2.0]], [[noise]])
    np.testing.assert_allclose(np.exp(posterior.score_samples(grid)), density, atol=1e-6)


def test_it_is_the_conditional_of_the_joint():
    prior, H, R = mixture(1), np.array([[1.0, -0.5], [0.3, 2.0], [0.0, 1.0]]), np.diag([0.5, 1.0, 0.2])
    cross = prior.covariances_ @ H.T
    top = np.concatenate([prior.covariances_, cross], 2)
    bottom = np.concatenate([cross.swapaxes(1, 2), H @ cross + R], 2)
    joint = GaussianMixture.from_parameters(
        prior.weights_, np.concatenate([prior.means_, prior.means_ @ H.T], 1), np.concatenate([top, bottom], 1)
    )
    y = np.array([[0.4, -1.0, 0.8]])
    given = joint.conditional(y, given=[2, 3, 4])
    posterior = kalman_update(prior, y, H, R)
    np.testing.assert_allclose(posterior.weights_, given.weights[0], atol=1e-9)
    np.testing.assert_allclose(posterior.means_, given.means[0], atol=1e-9)
    np.testing.assert_allclose(posterior.covariances_, given.covariances, atol=1e-9)


def test_observations_may_come_one_by_one_and_in_any_order():
    prior, H, R = mixture(2), np.array([[1.0, 0.7]]), [[0.4]]
    Y = np.array([[0.3], [-2.0], [1.1], [0.5]])
    whole, step = kalman_update(prior, Y, H, R), prior
    for y in Y[::-1]:
        step = kalman_update(step, y[None], H, R)
    same(whole, step)
    same(kalman_update(prior, np.empty((0, 1)), H, R), prior)


def test_far_observations_leave_weights_that_sum_to_one():
    posterior = kalman_update(mixture(3), [[1e5]], [[1.0, 0.0]], [[1e-4]])
    assert posterior.weights_.sum() == pytest.approx(1)
    assert (posterior.weights_ > 0).any()


def test_a_step_moves_samples_and_mixture_alike():
    prior, A, Q = mixture(4), np.array([[1.0, 0.5], [0.0, 0.8]]), np.diag([0.1, 0.3])
    rng = np.random.default_rng(0)
    rows = prior.sample(40_000)[0] @ A.T + rng.normal(size=(40_000, 2)) * np.sqrt([0.1, 0.3])
    moved = kalman_predict(prior, A, Q)
    between = moved.means_ - moved.weights_ @ moved.means_
    covariance = np.einsum("k,kij->ij", moved.weights_, moved.covariances_) + (moved.weights_ * between.T) @ between
    np.testing.assert_allclose(moved.weights_ @ moved.means_, rows.mean(0), atol=0.08)
    np.testing.assert_allclose(covariance, np.cov(rows.T), rtol=0.05, atol=0.1)
    same(kalman_predict(prior, np.eye(2), np.zeros((2, 2))), prior)


@pytest.mark.parametrize(
    ("Y", "matrix", "noise", "error", "words"),
    [
        ([[1.0]], [[1.0]], [[1.0]], ShapeError, "matrix must be"),
        ([1.0], [[1.0, 0.0]], [[1.0]], ShapeError, "Y must have 2 axes"),
        ([[1.0, 2.0]], [[1.0, 0.0]], [[1.0]], ShapeError, r"Y \(M, R\)"),
        ([[np.nan]], [[1.0, 0.0]], [[1.0]], OptionError, "Y must be finite"),
        ([[1.0]], [[1.0, 0.0]], [[0.0]], OptionError, "noise_cov must be symmetric and positive definite"),
        ([[1.0]], [[1.0, 0.0]], [[1.0, 0.0]], ShapeError, "noise_cov must be"),
    ],
)
def test_wrong_arguments_are_named(Y, matrix, noise, error, words):
    with pytest.raises(error, match=words):
        kalman_update(mixture(), Y, matrix, noise)


def test_a_step_with_wrong_arguments_is_named():
    with pytest.raises(ShapeError, match="matrix"):
        kalman_predict(mixture(), [[1.0]], [[1.0]])
    with pytest.raises(OptionError, match="semidefinite"):
        kalman_predict(mixture(), np.eye(2), -np.eye(2))
    noisy = GaussianMixture(1, noise_component=True).fit(np.random.default_rng(0).normal(size=(50, 2)))
    with pytest.raises(OptionError, match="noise component"):
        kalman_predict(noisy, np.eye(2), np.eye(2))
