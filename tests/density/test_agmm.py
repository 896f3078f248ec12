"""Gaussians of classes by online EM, and the losses that tie a classifier to them, against loops."""

import numpy as np
import pytest
import torch

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import ClassGaussians, absent_class_loss, agmm_loss, separation_loss


def batch(N=60, seed=0, known=0.3):
    """Rows of three classes, most of them without a label."""
    generator = np.random.default_rng(seed)
    classes_N = generator.integers(0, 3, N)
    x_ND = generator.normal(size=(N, 4)) + 2 * classes_N[:, None]
    labels_N = np.where(generator.uniform(size=N) < known, classes_N, -1)
    return x_ND, labels_N, classes_N


def slow_score(x, mean, variance):
    return np.exp(-(np.mean([abs(a - b) for a, b in zip(x, mean, strict=True)]) ** 2) / (2 * variance))


def slow_step(x_ND, labels_N, means, variances, weights):
    """One step of EM on a batch, row by row."""
    K = len(means)
    shares = []
    for x, label in zip(x_ND, labels_N, strict=True):
        scores = np.array([slow_score(x, mean, s) ** 4 / s**2 for mean, s in zip(means, variances, strict=True)])
        scores *= weights
        shares.append(np.eye(K)[label] if label >= 0 else scores / scores.sum())
    new_means = [sum(r[k] * x for r, x in zip(shares, x_ND, strict=True)) / sum(r[k] for r in shares) for k in range(K)]
    new_variances = []
    for k in range(K):
        squares = [r[k] * np.mean(abs(x - new_means[k])) ** 2 for r, x in zip(shares, x_ND, strict=True)]
        new_variances.append(sum(squares) / sum(r[k] for r in shares))
    return np.array(new_means), np.array(new_variances), np.mean(shares, axis=0)


def test_the_start_is_the_mean_of_each_class():
    x_ND, labels_N, _ = batch()
    found = ClassGaussians.start(x_ND, labels_N, 4)
    for k in range(3):
        np.testing.assert_allclose(found.means_KD[k], x_ND[labels_N == k].mean(0), rtol=1e-12)
    np.testing.assert_array_equal(found.present_K, [True, True, True, False])
    np.testing.assert_array_equal(found.scores(x_ND)[:, 3], 0)
    np.testing.assert_allclose(found.responsibilities(x_ND).sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(found.responsibilities(x_ND)[:, 3], 0)


def test_scores_are_one_at_a_mean_and_above_zero():
    x_ND, labels_N, _ = batch()
    for variance in ("adaptive", "fixed"):
        gaussians = ClassGaussians.start(x_ND, labels_N, 3, variance=variance)
        expected = [[slow_score(x, m, s) for m, s in zip(*gaussians[:2], strict=True)] for x in x_ND]
        np.testing.assert_allclose(gaussians.scores(x_ND), expected, rtol=1e-12)
        np.testing.assert_allclose(np.diagonal(gaussians.scores(gaussians.means_KD)), 1)
        assert 0 < gaussians.scores(x_ND).min() < gaussians.scores(x_ND).max() <= 1
    assert gaussians.scores(x_ND)[0, 0] == pytest.approx(np.exp(-(gaussians.distances(x_ND)[0, 0] ** 2)))


def test_without_momentum_a_batch_is_a_step_of_em():
    x_ND, labels_N, _ = batch()
    start = ClassGaussians.start(x_ND[:30], labels_N[:30], 3)
    found = start.update(x_ND, labels_N, momentum=0.0)
    for one, expected in zip(found, slow_step(x_ND, labels_N, *start), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-10)


def test_momentum_mixes_sums():
    """Sums over rows of shares, rows and squares are mixed, so a class with few rows in a batch moves little."""
    x_ND, labels_N, _ = batch()
    start = ClassGaussians.start(x_ND[:30], labels_N[:30], 3)
    means, _, shares = slow_step(x_ND, labels_N, *start)
    found = start.update(x_ND, labels_N, momentum=0.8)
    total = 0.8 * start.shares_K + 0.2 * shares
    np.testing.assert_allclose(found.shares_K, total, rtol=1e-10)
    mixed = 0.8 * start.shares_K[:, None] * start.means_KD + 0.2 * shares[:, None] * means
    np.testing.assert_allclose(found.means_KD, mixed / total[:, None], rtol=1e-10)
    gone = start.update(x_ND[labels_N == 0], labels_N[labels_N == 0], momentum=0.8)
    np.testing.assert_allclose(gone.means_KD[1:], start.means_KD[1:], rtol=1e-12)
    np.testing.assert_allclose(gone.variances_K[1:], start.variances_K[1:], rtol=1e-12)


def test_a_class_may_appear_later():
    x_ND, labels_N, _ = batch(known=1.0)
    two = ClassGaussians.start(x_ND, np.where(labels_N == 2, -1, labels_N), 3)
    assert not two.present_K[2]
    three = two.update(x_ND, labels_N, momentum=0.9)
    np.testing.assert_allclose(three.means_KD[2], x_ND[labels_N == 2].mean(0), rtol=1e-12)


def test_batches_find_the_classes():
    found = None
    for seed in range(60):
        x_ND, labels_N, _ = batch(N=200, seed=seed, known=0.02)
        found = ClassGaussians.start(x_ND, labels_N, 3) if found is None else found.update(x_ND, labels_N)
    np.testing.assert_allclose(found.means_KD, 2 * np.arange(3)[:, None] + np.zeros(4), atol=0.3)
    x_ND, _, classes_N = batch(N=500, seed=99)
    assert (found.responsibilities(x_ND).argmax(1) == classes_N).mean() > 0.93


def slow_loss(p_NK, g_NK, labels_N, present_K):
    """As the published code has it: halves, means over present classes, then over rows."""

    def bce(p, t):
        return -t * np.log(p + 1e-6) - (1 - t) * np.log(1 - p + 1e-6)

    agree, fit = [], []
    for p, g, label in zip(p_NK, g_NK, labels_N, strict=True):
        there = np.flatnonzero(present_K)
        agree.append(np.mean([bce(p[k], g[k]) / 2 for k in there]))
        if label >= 0:
            fit.append(np.mean([bce(g[k], float(k == label)) / 2 for k in there]))
    return np.mean(agree) + np.mean(fit)


def test_the_loss_is_that_of_a_loop():
    _, labels_N, _ = batch()
    generator = np.random.default_rng(1)
    p_NK, g_NK = generator.dirichlet(np.ones(4), 60), generator.uniform(0.01, 0.99, (60, 4))
    present_K = np.array([True, True, True, False])
    found = agmm_loss(p_NK, g_NK, labels_N, present_K)
    assert found == pytest.approx(slow_loss(p_NK, g_NK, labels_N, present_K), rel=1e-10)


def test_with_all_labels_one_hot_is_best():
    labels_N = np.array([0, 1, 2, 1])
    best = np.eye(3)[labels_N]
    least = agmm_loss(best, best, labels_N, np.ones(3, bool))
    assert abs(least) < 1e-5
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = [(1 - a) * best + a * generator.dirichlet(np.ones(3), 4) for a in generator.uniform(0.01, 1, 2)]
        assert agmm_loss(*other, labels_N, np.ones(3, bool)) > least


def test_means_are_pushed_apart():
    means_KD = np.array([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0], [0.5, 0.5]])
    found = separation_loss(means_KD, np.array([True, True, True, False]))
    assert found == pytest.approx(np.mean([np.exp(-(d**2)) for d in (2.0, 9.0, 7.0)]), rel=1e-12)
    assert separation_loss(means_KD, np.array([True, False, False, False])) == 0
    means = torch.tensor(means_KD[[0, 3]], requires_grad=True)
    (slope,) = torch.autograd.grad(separation_loss(means, torch.tensor([True, True])), means)
    assert (slope[0] > 0).all()  # descent moves the lower one down and the higher one up
    assert (slope[1] < 0).all()


def test_absent_classes_are_pushed_down():
    p_NK = np.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]])
    present_NK = np.array([[True, True, False], [True, False, True]])
    assert absent_class_loss(p_NK, present_NK) == pytest.approx(-(np.log(0.7) + np.log(0.6)) / 2, rel=1e-5)
    assert absent_class_loss(p_NK, np.ones((2, 3), bool)) == 0


def test_torch_gives_the_same_and_gradients_to_features():
    x_ND, labels_N, _ = batch()
    p_NK = np.random.default_rng(1).dirichlet(np.ones(3), 60)

    def losses(x, labels, p):
        gaussians = ClassGaussians.start(x[:30], labels[:30], 3).update(x, labels, momentum=0.5)
        scores = gaussians.scores(x)
        present = gaussians.present_K
        return agmm_loss(p, scores, labels, present) + separation_loss(gaussians.means_KD, present), gaussians

    x = torch.tensor(x_ND, requires_grad=True)
    found, gaussians = losses(x, torch.tensor(labels_N), torch.tensor(p_NK))
    expected, _ = losses(x_ND, labels_N, p_NK)
    assert found.item() == pytest.approx(expected, rel=1e-10)
    assert not gaussians.variances_K.requires_grad
    (slope,) = torch.autograd.grad(found, x)
    step = 1e-6 * np.eye(60 * 4)[17].reshape(60, 4)  # variances and responsibilities are held, so only in sign
    moved, _ = losses(x_ND + step, labels_N, p_NK)
    assert np.sign(moved - expected) == np.sign(slope.flatten()[17].item())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, y: ClassGaussians.start(x, y[:-1], 3), ShapeError, r"labels_N must be \(60,\), one for each row"),
        (lambda x, y: ClassGaussians.start(x, y, 2), OptionError, r"labels_N must lie in -1 .. 1, got -1 .. 2"),
        (lambda x, y: ClassGaussians.start(x, 0 * y - 1, 3), OptionError, "must hold a label that is known"),
        (lambda x, y: ClassGaussians.start(x, y, 3, variance="free"), OptionError, "'adaptive' or 'fixed', got 'free'"),
        (lambda x, y: ClassGaussians.start(x, y, 3).update(x, y, momentum=1), OptionError, "momentum must lie in 0"),
        (lambda x, y: ClassGaussians.start(x, y, 3).scores(x[:, :2]), ShapeError, r"features_ND must be \(N, 4\)"),
        (lambda x, y: agmm_loss(x, x[:, :2], y, np.ones(4)), ShapeError, r"must both be \(N, K\)"),
    ],
)
def test_bad_input_is_named(call, error, words):
    x_ND, labels_N, _ = batch()
    with pytest.raises(error, match=words):
        call(x_ND, labels_N)
