"""Networks from priors to posteriors: sets in, mixtures out, and near the exact posterior once trained."""

import numpy as np
import pytest
import torch
from scipy import stats

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import GaussianMixture, kalman_update
from mixtura.density.distribution_transformer import DistributionTransformer, MixtureBatch, fit_transformer

NOISE = 0.5


def priors(B, K, D, generator):
    """Random mixtures."""
    logs_BK = torch.randn(B, K, generator=generator).log_softmax(-1)
    diagonal = (0.4 * torch.randn(B, K, D, generator=generator)).exp()
    below = 0.5 * torch.randn(B, K, D, D, generator=generator).tril(-1)
    return MixtureBatch(logs_BK, 2 * torch.randn(B, K, D, generator=generator), below + torch.diag_embed(diagonal))


def draw(B, K, D, M, generator):
    """Priors, theta, and observations of theta with noise."""
    prior = priors(B, K, D, generator)
    theta_BD = prior.sample(generator)
    return prior, theta_BD, theta_BD[:, None] + NOISE**0.5 * torch.randn(B, M, D, generator=generator)


def untied(D, C=2, seed=0):
    """A small network of which no layer is 0."""
    torch.manual_seed(seed)
    model = DistributionTransformer(D, C, width=16, depth=2, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("D", [1, 3])
def test_densities_and_draws_are_those_of_the_mixtures(D):
    batch = priors(4, 3, D, seeded())
    theta = torch.randn(4, D, generator=seeded(1))
    log = batch.log_prob(theta)
    for i in range(4):
        mixture = batch.mixture(i)
        assert log[i].item() == pytest.approx(mixture.score_samples(theta[i : i + 1].numpy())[0], abs=1e-4)
        again = MixtureBatch.of(mixture)
        for one, two in zip(again, batch, strict=True):
            torch.testing.assert_close(one[0], two[i], atol=1e-4, rtol=1e-4)
    many = MixtureBatch(*(part[:1].expand(3000, *part.shape[1:]) for part in priors(1, 3, 1, seeded(2))))
    cdf = lambda x: sum(
        np.exp(w) * stats.norm(m, s).cdf(x)
        for w, m, s in zip(*(part[0].flatten().numpy().astype(float) for part in many), strict=True)
    )
    assert stats.kstest(many.sample(seeded(3))[:, 0].numpy(), cdf).pvalue > 1e-3


def test_an_untrained_network_returns_the_prior():
    prior, _, data = draw(3, 4, 2, 5, seeded())
    for one, two in zip(DistributionTransformer(2, 2)(prior, data), prior, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("M", [0, 1, 6])
def test_components_and_data_are_sets(M):
    model, (prior, _, data) = untied(2), draw(3, 4, 2, M, seeded())
    out = model(prior, data)
    swap = torch.tensor([2, 0, 3, 1])
    swapped = model(MixtureBatch(*(part[:, swap] for part in prior)), data.flip(1))
    for one, two in zip(swapped, out, strict=True):
        torch.testing.assert_close(one, two[:, swap], atol=1e-4, rtol=1e-4)
    assert (out.means_BKD - prior.means_BKD).abs().max() > 0.01


def test_whatever_the_network_says_is_a_mixture():
    model, (prior, theta, data) = untied(3, 3), draw(50, 4, 3, 6, seeded())
    out = model(prior, 10 * data)
    torch.testing.assert_close(out.log_weights_BK.exp().sum(1), torch.ones(50))
    assert (out.factors_BKDD.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (out.factors_BKDD == out.factors_BKDD.tril()).all()
    assert out.log_prob(theta).isfinite().all()


def test_the_number_of_equal_observations_is_seen():
    model, (prior, _, data) = untied(2), draw(1, 3, 2, 1, seeded())
    once, often = model(prior, data), model(prior, data.expand(1, 8, 2))
    assert (once.means_BKD - often.means_BKD).abs().max() > 1e-3


def test_problems_of_a_batch_do_not_mix():
    model, (prior, _, data) = untied(2), draw(3, 4, 2, 5, seeded())
    alone = model(MixtureBatch(*(part[1:2] for part in prior)), data[1:2])
    for one, two in zip(alone, model(prior, data), strict=True):
        torch.testing.assert_close(one[0], two[1], atol=1e-5, rtol=1e-5)


def test_training_comes_near_the_exact_posterior():
    torch.manual_seed(0)
    generator = seeded()
    model = DistributionTransformer(1, 1, width=32, depth=2)

    def problems():
        return draw(128, 2, 1, int(torch.randint(1, 4, (), generator=generator)), generator)

    losses = fit_transformer(model, problems, steps=250, lr=3e-3)
    assert np.mean(losses[-25:]) < np.mean(losses[:25]) - 0.5
    prior, theta, data = draw(100, 2, 1, 2, seeded(9))
    exact = [kalman_update(prior.mixture(i), data[i].numpy(), [[1.0]], [[NOISE]]) for i in range(100)]
    best = np.mean([exact[i].score_samples(theta[i : i + 1].numpy())[0] for i in range(100)])
    mine = model(prior, data).log_prob(theta).mean().item()
    assert mine > best - 0.15
    assert prior.log_prob(theta).mean().item() < best - 0.8


def test_mixtures_of_the_package_go_in_and_come_out():
    prior = GaussianMixture.from_parameters([0.3, 0.7], [[0.0, 1.0], [2.0, -1.0]], np.stack([np.eye(2)] * 2))
    out = untied(2).posterior(prior, [[0.5, 0.1], [0.3, 0.2]])
    assert isinstance(out, GaussianMixture)
    assert out.weights_.sum() == pytest.approx(1)
    unchanged = DistributionTransformer(2, 2).posterior(prior, np.empty((0, 2)))
    np.testing.assert_allclose(unchanged.means_, prior.means_, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: DistributionTransformer(0, 1), OptionError, "n_columns"),
        (lambda: DistributionTransformer(1, 1, width=10), OptionError, "width must be a multiple"),
        (lambda: untied(2)(priors(3, 2, 1, seeded()), torch.zeros(3, 1, 2)), ShapeError, "2 columns"),
        (lambda: untied(2)(priors(3, 2, 2, seeded()), torch.zeros(2, 1, 2)), ShapeError, "B=3"),
        (lambda: untied(2)(priors(3, 2, 2, seeded()), torch.zeros(3, 1, 1)), ShapeError, "M, 2"),
        (lambda: fit_transformer(untied(1), lambda: draw(2, 2, 1, 1, seeded()), steps=0), OptionError, "steps"),
        (
            lambda: MixtureBatch.of(GaussianMixture.from_parameters([1, 0], [[0], [1]], [[[1]], [[1]]])),
            OptionError,
            "weight",
        ),
    ],
)
def test_wrong_calls_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
