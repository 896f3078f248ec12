"""A Bayes mixture of given models: the chain rule, multiplicities, and bounds of regret, against exact sums."""

import itertools

import numpy as np
import pytest

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import BayesMixture, GaussianMixture, hypothesis_weight, regret_bound


def coins(M=6, N=40, seed=0):
    """Log likelihoods (N, M) of tosses under M coins, and the heads of the coins."""
    generator = np.random.default_rng(seed)
    heads_M = generator.uniform(0.1, 0.9, M)
    tosses_N = generator.uniform(size=N) < heads_M[0]
    return np.log(np.where(tosses_N[:, None], heads_M, 1 - heads_M)), heads_M


def divergence(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_one_after_the_other_is_the_batch():
    log_NM, _ = coins()
    prior_M = np.random.default_rng(1).dirichlet(np.ones(6))
    joint_M = prior_M * np.exp(log_NM).prod(0)  # few and long enough for plain products
    mixture = BayesMixture(prior_M)
    said_N = mixture.update(log_NM)
    assert said_N.sum() == pytest.approx(np.log(joint_M.sum()), rel=1e-12)
    assert mixture.log_loss_ == pytest.approx(-said_N.sum(), rel=1e-12)
    np.testing.assert_allclose(mixture.weights_, joint_M / joint_M.sum(), rtol=1e-10)
    split = BayesMixture(prior_M)
    parts_N = np.concatenate([split.update(part) for part in (log_NM[:1], log_NM[1:17], log_NM[17:17], log_NM[17:])])
    np.testing.assert_allclose(parts_N, said_N, atol=1e-12)
    np.testing.assert_allclose(split.weights_, mixture.weights_, rtol=1e-10)


def test_each_step_is_the_prediction_of_the_weights():
    log_NM, _ = coins()
    mixture = BayesMixture(6)
    for log_M in log_NM:
        expected = mixture.predict(np.exp(log_M))
        assert np.exp(mixture.update(log_M).item()) == pytest.approx(expected, rel=1e-12)
    assert mixture.predict(np.full((6, 2, 3), 0.25)) == pytest.approx(np.full((2, 3), 0.25))


def test_copies_of_a_model_are_a_model_of_more_weight():
    log_NM, _ = coins()
    copies = np.array([0, 1, 1, 1, 2, 3, 4, 5])
    alone, copied = BayesMixture([1, 3, 1, 1, 1, 1]), BayesMixture(len(copies))
    np.testing.assert_allclose(copied.update(log_NM[:, copies]), alone.update(log_NM), atol=1e-12)
    np.testing.assert_allclose(np.bincount(copies, copied.weights_), alone.weights_, rtol=1e-12)


@pytest.mark.parametrize("copies", [1, 5, 200])
def test_regret_of_every_sequence_is_below_the_log_of_the_class_over_the_copies(copies):
    heads_M = np.concatenate([np.full(copies, 0.7), np.linspace(0.05, 0.95, 200)])
    worst = 0.0
    for tosses in itertools.product([0, 1], repeat=8):
        log_NM = np.log(np.where(np.array(tosses)[:, None], heads_M, 1 - heads_M))
        mixture = BayesMixture(len(heads_M))
        mixture.update(log_NM)
        worst = max(worst, mixture.log_loss_ + log_NM[:, 0].sum())
    assert worst <= np.log(len(heads_M) / copies) + 1e-9


def exact_regret(truth, heads_M, prior_M, n):
    """Expected regret over n tosses: a sum over the number of heads."""
    total = 0.0
    for count in range(n + 1):
        ways = np.prod([(n - i) / (i + 1) for i in range(count)])
        of_truth = truth**count * (1 - truth) ** (n - count)
        of_mixture = prior_M @ (heads_M**count * (1 - heads_M) ** (n - count))
        total += ways * of_truth * np.log(of_truth / of_mixture)
    return total


@pytest.mark.parametrize("n", [1, 10, 60])
@pytest.mark.parametrize("truth", [0.3, 0.52])
def test_bounds_hold_for_exact_regret(truth, n):
    generator = np.random.default_rng(n)
    heads_M, prior_M = generator.uniform(0.02, 0.98, 30), generator.dirichlet(np.ones(30))
    found = regret_bound(divergence(truth, heads_M), n, prior_M)
    assert exact_regret(truth, heads_M, prior_M, n) <= found.sharper <= found.bound
    levels = divergence(truth, heads_M)
    by_hand = [n * level - np.log(hypothesis_weight(levels, level, prior_M)) for level in levels]
    assert found.bound == pytest.approx(min(by_hand), rel=1e-12)
    assert found.level == pytest.approx(levels[np.argmin(by_hand)])
    assert found.weight == pytest.approx(hypothesis_weight(levels, found.level, prior_M))


def test_bounds_at_the_ends():
    divergences = [0.0, 0.0, 0.5, np.inf]
    assert regret_bound(divergences, 0) == pytest.approx((-np.log(0.75), 0.5, 0.75, -np.log(0.75)))
    many = regret_bound(divergences, 10_000)
    assert many == pytest.approx((np.log(2), 0.0, 0.5, np.log(2)))
    assert hypothesis_weight(divergences, 0.4) == pytest.approx(0.5)


def test_densities_are_models():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 2)) + 4 * generator.integers(0, 2, (300, 1))
    models = [GaussianMixture(K, random_state=0).fit(X[:200]) for K in (1, 2)]
    mixture = BayesMixture(2)
    mixture.update(np.stack([model.score_samples(X[200:]) for model in models], axis=1))
    assert mixture.weights_[1] > 0.99


def test_what_a_model_rules_out_ends_it():
    mixture = BayesMixture(2)
    mixture.update([[-np.inf, np.log(0.5)]])
    np.testing.assert_array_equal(mixture.weights_, [0, 1])
    with pytest.raises(OptionError, match="outcome 1 is ruled out by every model that has weight"):
        mixture.update([[0.0, -1.0], [0.0, -np.inf]])
    np.testing.assert_array_equal(mixture.weights_, [0, 1])  # a refused batch changes nothing


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BayesMixture(0), OptionError, "prior must be a whole number of at least 1, got 0"),
        (lambda: BayesMixture([0.0, 0.0]), OptionError, "not all zero"),
        (lambda: BayesMixture([[1.0]]), ShapeError, r"prior must be \(M,\), got shape \(1, 1\)"),
        (lambda: BayesMixture(3).update([[0.0, 0.0]]), ShapeError, r"a column for each of 3 models, got \(1, 2\)"),
        (lambda: BayesMixture(1).update([[np.nan]]), OptionError, "no NaN"),
        (lambda: BayesMixture(3).predict([1.0]), ShapeError, r"probabilities must be \(3, ...\)"),
        (lambda: regret_bound([-1.0], 3), OptionError, "divergences_M must be at least 0, got"),
        (lambda: regret_bound([[0.0]], 3), ShapeError, r"divergences_M must be \(M,\)"),
        (lambda: regret_bound([0.0], 3, [1, 1]), ShapeError, "prior must hold 1 weights, got 2"),
        (lambda: regret_bound([0.0, np.inf], 3, [0, 1]), OptionError, "finite for a model that has weight"),
        (lambda: regret_bound([0.0], 1.5), OptionError, "n must be a whole number"),
        (lambda: hypothesis_weight([0.0], -1), OptionError, "level must be a number of at least 0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
