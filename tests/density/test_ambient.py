"""Rows with known noise: denoising, and what denoisers are trained by, against closed forms of Gaussians."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal

from density.tables import rows, with_holes
from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import (
    BayesianGaussianMixture,
    GaussianMixture,
    ambient_loss,
    at_level,
    consistency_loss,
    denoise,
    noise_levels,
)


def fitted(family="VVV"):
    return GaussianMixture(3, covariance=family, random_state=0).fit(rows()[0])


def slow_denoise(mixture, X, noise):
    """Posterior means, row by row, over the columns that are there."""
    out = np.empty(X.shape)
    for n, (x, own) in enumerate(zip(X, noise, strict=True)):
        o = np.flatnonzero(~np.isnan(x))
        joint, means = [], []
        for weight, mean, covariance in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True):
            total = (covariance + own)[np.ix_(o, o)]
            joint.append(weight * multivariate_normal.pdf(x[o], mean[o], total) if len(o) else weight)
            means.append(mean + covariance[:, o] @ np.linalg.solve(total, x[o] - mean[o]))
        out[n] = np.array(joint) @ np.array(means) / sum(joint)
    return out


@pytest.mark.parametrize("family", ["VVV", "VVI"])
@pytest.mark.parametrize("holes", [False, True])
def test_denoised_rows_are_posterior_means(family, holes):
    mixture, X = fitted(family), rows(n=40, seed=5)[0]
    X = with_holes(X) if holes else X
    roots = np.random.default_rng(0).normal(size=(40, 3, 3))
    noise = roots @ roots.swapaxes(1, 2)
    np.testing.assert_allclose(denoise(mixture, X, noise), slow_denoise(mixture, X, noise), rtol=1e-9)
    variances = np.diagonal(noise, axis1=1, axis2=2)
    expected = slow_denoise(mixture, X, variances[:, :, None] * np.eye(3))
    np.testing.assert_allclose(denoise(mixture, X, variances), expected, rtol=1e-9)


def test_without_noise_rows_stay_and_under_much_noise_nothing_is_left_of_them():
    mixture, X = fitted(), rows(n=20, seed=5)[0]
    np.testing.assert_allclose(denoise(mixture, X, np.zeros(X.shape)), X, rtol=1e-12)
    mean = mixture.weights_ @ mixture.means_
    np.testing.assert_allclose(denoise(mixture, X, np.full(X.shape, 1e12)), np.tile(mean, (20, 1)), rtol=1e-4)
    bayes = BayesianGaussianMixture(3, random_state=0, max_iter=1000).fit(rows()[0])
    np.testing.assert_allclose(denoise(bayes, X, np.zeros(X.shape)), X, rtol=1e-12)


def test_denoising_is_nearer_to_what_was_behind():
    mixture, (clean, _) = fitted(), rows(n=2000, seed=9)
    noisy = clean + 2 * np.random.default_rng(1).normal(size=clean.shape)
    found = denoise(mixture, noisy, np.full(noisy.shape, 4.0))
    shrunk = [noisy * a + noisy.mean(0) * (1 - a) for a in np.linspace(0, 1, 21)]
    best_line = min(((one - clean) ** 2).mean() for one in shrunk)
    assert ((found - clean) ** 2).mean() < 0.9 * best_line


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_row_under_endless_noise_does_not_move_the_means():
    X, _ = rows(n=300)
    lost = np.random.default_rng(0).normal(size=(60, 3)) * 1e7
    noise = np.concatenate([np.zeros((300, 3)), np.full((60, 3), 1e14)])
    alone = GaussianMixture(3, init=rows(n=300)[1], tol=1e-12, max_iter=2000).fit(X)
    again = GaussianMixture.from_parameters(alone.weights_, alone.means_, alone.covariances_)
    again.set_params(warm_start=True, max_iter=5, tol=0).fit(np.concatenate([X, lost]), noise_cov=noise)
    np.testing.assert_allclose(again.means_, alone.means_, rtol=1e-5)
    np.testing.assert_allclose(again.covariances_, alone.covariances_, rtol=1e-4, atol=1e-5)


def means_at_levels(mixture, x_ND, sigma, level):
    """E[x_s | x_t] exactly: x_s is a mixture as well, whose components are wider by s^2."""
    D = x_ND.shape[1]
    wider = GaussianMixture.from_parameters(
        mixture.weights_, mixture.means_, mixture.covariances_ + level**2 * np.eye(D)
    )
    return denoise(wider, x_ND, np.full(x_ND.shape, sigma**2 - level**2))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.5])
def test_the_mean_at_a_level_is_exact(level):
    mixture, x_ND = fitted(), rows(n=30, seed=7)[0]
    ones_N = np.ones(30)
    denoised = denoise(mixture, x_ND, np.full(x_ND.shape, 1.5**2))
    found = at_level(denoised, x_ND, 1.5 * ones_N, level * ones_N)
    np.testing.assert_allclose(found, means_at_levels(mixture, x_ND, 1.5, level), rtol=1e-9)


def test_levels_never_lie_below_the_noise_of_the_row():
    normal_N = np.random.default_rng(0).normal(size=1000)
    least_N = np.where(np.arange(1000) < 500, 0.0, 0.4)
    levels_N = noise_levels(normal_N, least_N)
    np.testing.assert_allclose(np.log(levels_N[:500]), -1.2 + 1.2 * normal_N[:500], rtol=1e-12)
    assert levels_N[500:].min() == 0.4
    given = torch.tensor(normal_N)
    np.testing.assert_allclose(noise_levels(given, torch.tensor(least_N)).numpy(), levels_N, rtol=1e-12)
    np.testing.assert_allclose(noise_levels(given, 0.4).numpy(), noise_levels(normal_N, 0.4), rtol=1e-12)


def test_clean_rows_have_the_loss_of_edm_bit_for_bit():
    generator = np.random.default_rng(0)
    y, n, sigma_N = generator.normal(size=(50, 4)), generator.normal(size=(50, 4)), generator.exponential(size=50)

    def denoiser(x, sigma):
        return np.tanh(x) / (1 + sigma[:, None])

    sigma = sigma_N[:, None]
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    expected = (weight * (denoiser(y + sigma * n, sigma_N) - y) ** 2).mean(1)
    np.testing.assert_array_equal(ambient_loss(denoiser, y, np.zeros(50), sigma_N, n), expected)


@pytest.mark.parametrize(("variance", "level", "sigma"), [(1.0, 0.5, 0.8), (4.0, 2.0, 5.0), (1.0, 0.3, 0.30001)])
def test_noisy_rows_teach_the_denoiser_of_clean_ones(variance, level, sigma):
    """Of Gaussian rows the loss is least at x_t v / (v + t^2), though no clean row was seen; integrals are exact."""
    points, weights = np.polynomial.hermite_e.hermegauss(8)
    y, n = (grid.reshape(-1, 1) for grid in np.meshgrid(points * np.sqrt(variance + level**2), points))
    weights_N = np.outer(weights, weights).ravel()
    ones_N = np.ones(len(y))

    def loss(slope):
        per_row_N = ambient_loss(lambda x, _: slope * x, y, level * ones_N, sigma * ones_N, n)
        return weights_N @ per_row_N

    spread = loss(0.0) - 2 * loss(1.0) + loss(2.0)
    assert spread > 0
    best = minimize_scalar(loss, bracket=(-1, 2), tol=1e-12).x
    assert best == pytest.approx(variance / (variance + sigma**2), abs=1e-3 if sigma - level < 1e-3 else 1e-6)


def test_torch_gives_the_same_and_gradients():
    generator = np.random.default_rng(0)
    y, n = generator.normal(size=(6, 2, 3)), generator.normal(size=(6, 2, 3))
    level_N, sigma_N = np.full(6, 0.3), 0.3 + generator.exponential(size=6)
    normals = generator.normal(size=(2, 3, 6, 2, 3))

    def losses(array, slope):
        def denoiser(x, sigma):
            return slope * x / (1 + sigma[:, None, None])

        given = [array(one) for one in (y, level_N, sigma_N, n)]
        ambient = ambient_loss(denoiser, *given)
        consistency = consistency_loss(denoiser, given[0], given[2], given[1] * 0.1, array(normals))
        return ambient, consistency

    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(losses(torch.tensor, slope), losses(np.asarray, 0.7), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12)
        assert expected.shape == (6,)
        (gradient,) = torch.autograd.grad(found.sum(), slope)
        assert abs(gradient) > 0


def test_denoised_means_are_a_martingale():
    """Along the reverse process of any linear denoiser that belongs to a Gaussian; of another form they are not."""
    generator = np.random.default_rng(0)
    N, paths, steps = 30, 200, 20
    x = generator.normal(size=(N, 2)) * np.sqrt(1 + 1.5**2)
    normals = generator.normal(size=(paths, steps, N, 2))

    def loss(denoiser):
        return consistency_loss(denoiser, x, np.full(N, 1.5), np.full(N, 0.3), normals).mean()

    right = loss(lambda x, sigma: x / (1 + sigma[:, None] ** 2))
    assert right < 2 / paths  # the variance of a path's end is below 1
    assert loss(lambda x, sigma: x * 4 / (4 + sigma[:, None] ** 2)) < 8 / paths
    assert loss(lambda x, sigma: 0.5 * x + 0 * sigma[:, None]) > 20 * right


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, one: at_level(x, x, one[:2], one[:2]), ShapeError, r"sigma_N must be \(3,\), one for each row"),
        (lambda x, one: at_level(x, x, one, 2 * one), OptionError, "0 <= level_N <= sigma_N"),
        (lambda x, one: at_level(x, x, 0 * one, 0 * one), OptionError, "0 < sigma_N"),
        (lambda x, one: ambient_loss(lambda a, b: a, x, -one, one, x), OptionError, "0 <= level_N"),
        (lambda x, one: consistency_loss(lambda a, b: a, x, one, one, x[None, None]), OptionError, "0 < lower_N"),
        (lambda x, one: denoise(fitted(), x, one), ShapeError, r"noise_cov must be \(3, 3\) or"),
        (lambda x, one: denoise(fitted(), x, -np.ones((3, 3))), OptionError, "positive semidefinite"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(np.ones((3, 3)), np.ones(3))


def test_a_noise_component_has_no_mean():
    mixture = GaussianMixture(2, noise_component=True, random_state=0).fit(rows()[0])
    with pytest.raises(OptionError, match="a mixture with a noise component has no posterior mean"):
        denoise(mixture, rows()[0], np.ones((200, 3)))
