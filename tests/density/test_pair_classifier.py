"""Pairs of responses: what they say of a set of truths, exactly, and the classifier that learns them."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import estimator_checks_generator

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import PairClassifier, epistemic_confidence, epistemic_covariance, probability_radius


def truths(M=5, K=4, seed=0):
    """Distributions that a model cannot tell apart, and how often each is the true one."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(K), M), generator.dirichlet(np.ones(M))


def joint_of(truths_MK, shares_M):
    return np.einsum("m,mi,mj->ij", shares_M, truths_MK, truths_MK)


@pytest.mark.parametrize("seed", range(3))
def test_the_covariance_is_that_of_the_truths(seed):
    truths_MK, shares_M = truths(seed=seed)
    error_MK = truths_MK - shares_M @ truths_MK
    expected = (shares_M[:, None, None] * error_MK[:, :, None] * error_MK[:, None]).sum(0)
    found = epistemic_covariance(joint_of(truths_MK, shares_M))
    np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-14)
    p = shares_M @ truths_MK
    again = np.diagonal(joint_of(truths_MK, shares_M)) / p
    np.testing.assert_allclose(np.diagonal(found), p * (again - p), atol=1e-14)


def test_what_is_known_has_no_variance_and_what_is_certain_but_unknown_has_the_most():
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(epistemic_covariance(np.outer(p, p)), 0, atol=1e-15)
    np.testing.assert_allclose(np.diagonal(epistemic_covariance(np.diag(p))), p * (1 - p), atol=1e-15)


def test_a_joint_that_no_truths_have_is_moved_to_the_nearest():
    joint = np.array([[0.1, 0.3, 0.1], [0.3, 0.0, 0.05], [0.1, 0.05, 0.0]])  # responses that avoid each other
    raw = joint - np.outer(joint.sum(0), joint.sum(0))
    found = epistemic_covariance(joint)
    assert np.linalg.eigvalsh(raw)[0] < -0.1
    assert np.linalg.eigvalsh(found)[0] > -1e-15
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-15)
    generator = np.random.default_rng(0)
    for _ in range(200):  # no other covariance lies nearer
        root = generator.normal(size=(3, 3)) * generator.exponential(0.3)
        other = found + root @ root.T * 0.1
        assert np.linalg.norm(found - raw) <= np.linalg.norm(other - raw) + 1e-12
    skewed = joint + np.array([[0, 0.02, 0], [-0.02, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(epistemic_covariance(skewed), found, atol=1e-15)


@pytest.mark.parametrize("miss", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_for_every_set_of_truths(seed, miss):
    truths_MK, shares_M = truths(M=30, seed=seed)
    truths_MK = np.where(truths_MK < 0.1, 0, truths_MK)
    truths_MK /= truths_MK.sum(1, keepdims=True)
    joint, p = joint_of(truths_MK, shares_M), shares_M @ truths_MK
    radius_K = probability_radius(np.diagonal(epistemic_covariance(joint)), miss)
    assert (shares_M @ (np.abs(truths_MK - p) >= radius_K) <= miss).all()
    confidence_K = epistemic_confidence(np.log(p), np.log(np.diagonal(joint) / p))
    impossible_K = shares_M @ (truths_MK == 0)
    assert impossible_K.max() > 0.1
    assert (impossible_K <= 1 - confidence_K + 1e-12).all()


def test_bounds_are_reached():
    truths_MK, shares_M = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([0.4, 0.6])
    joint, p = joint_of(truths_MK, shares_M), shares_M @ truths_MK
    confidence_K = epistemic_confidence(np.log(p), np.log(np.diagonal(joint) / p))
    assert 1 - confidence_K[0] == pytest.approx(0.4)  # the share of truths in which response 0 is impossible
    assert epistemic_confidence(-1.0, -2.0) == 1


def table(N=4000, R=2, seed=0):
    """Rows of four visible kinds; of each, two hidden kinds decide the probabilities of three responses."""
    generator = np.random.default_rng(seed)
    truth_VHK = generator.dirichlet(np.ones(3), (4, 2))
    visible_N, hidden_N = generator.integers(0, 4, N), generator.integers(0, 2, N)
    edges_NK = truth_VHK[visible_N, hidden_N].cumsum(1)
    y_NR = (generator.uniform(size=(N, R, 1)) > edges_NK[:, None]).sum(2)
    return visible_N[:, None].astype(float), np.array(["a", "b", "c"])[y_NR.clip(0, 2)], truth_VHK


def test_a_classifier_of_pairs_is_that_of_counts():
    """A tree that splits fully counts pairs; so does a loop."""
    X, y, _ = table()
    model = PairClassifier(DecisionTreeClassifier()).fit(X, y)
    for kind in range(4):
        counts = np.zeros((3, 3))
        for one, two in y[X[:, 0] == kind]:
            counts["abc".index(one), "abc".index(two)] += 0.5
            counts["abc".index(two), "abc".index(one)] += 0.5
        expected = counts / counts.sum()
        np.testing.assert_allclose(model.predict_joint([[kind]])[0], expected, atol=1e-12)
        np.testing.assert_allclose(model.predict_proba([[kind]])[0], expected.sum(0), atol=1e-12)
        np.testing.assert_allclose(model.epistemic_covariance([[kind]])[0], epistemic_covariance(expected), atol=1e-12)
        assert model.predict([[kind]])[0] == "abc"[expected.sum(0).argmax()]


def test_the_error_is_known_without_the_truth():
    X, y, truth_VHK = table(N=40_000)
    model = PairClassifier(DecisionTreeClassifier()).fit(X, y)
    kinds = np.arange(4.0)[:, None]
    error_VHK = truth_VHK - model.predict_proba(kinds)[:, None]
    claimed_VK = np.diagonal(model.epistemic_covariance(kinds), axis1=1, axis2=2)
    np.testing.assert_allclose(claimed_VK, (error_VHK**2).mean(1), atol=0.01)
    assert claimed_VK.max() > 0.1


def test_all_pairs_of_more_responses_count():
    X, y, _ = table(N=300, R=3)
    three = PairClassifier(DecisionTreeClassifier()).fit(X, y)
    pairs = [y[:, [0, 1]], y[:, [0, 2]], y[:, [1, 2]]]
    two = PairClassifier(DecisionTreeClassifier()).fit(np.tile(X, (3, 1)), np.concatenate(pairs))
    np.testing.assert_allclose(three.predict_joint(X), two.predict_joint(X), atol=1e-12)
    turned = PairClassifier(DecisionTreeClassifier()).fit(X, y[:, ::-1])
    np.testing.assert_allclose(three.predict_joint(X), turned.predict_joint(X), atol=1e-12)


def test_weights_are_repetitions():
    X, y, _ = table(N=200)
    weights = np.random.default_rng(0).integers(0, 3, 200)
    weighted = PairClassifier(DecisionTreeClassifier()).fit(X, y, sample_weight=weights)
    repeated = PairClassifier(DecisionTreeClassifier()).fit(
        np.repeat(X, weights, axis=0), np.repeat(y, weights, axis=0)
    )
    np.testing.assert_allclose(weighted.predict_joint(X), repeated.predict_joint(X), atol=1e-12)


def test_one_response_says_nothing_of_pairs():
    X, y, _ = table(N=200)
    single = PairClassifier(DecisionTreeClassifier()).fit(X, y[:, 0])
    plain = DecisionTreeClassifier().fit(X, y[:, 0])
    np.testing.assert_array_equal(single.predict_proba(X), plain.predict_proba(X))
    with pytest.raises(OptionError, match="y of fit must hold two responses or more for each row"):
        single.epistemic_covariance(X)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: epistemic_covariance(np.ones((2, 3)) / 6), ShapeError, r"joint must be \(..., K, K\), got"),
        (lambda: epistemic_covariance(np.ones((2, 2))), OptionError, "with a sum of 1"),
        (lambda: epistemic_covariance([[1.5, -0.25], [-0.25, 0]]), OptionError, "not negative"),
        (lambda: probability_radius(0.1, 0), OptionError, r"miss must lie in 0 .. 1, got 0"),
        (lambda: probability_radius([-0.1], 0.1), OptionError, "variance must be at least 0"),
        (lambda: epistemic_confidence([0.0], [0.0, 0.0]), ShapeError, "must have the same shape"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def checks():
    """Every check but that of array-API input, which scikit-learn leaves to an environment variable."""
    for estimator, check in estimator_checks_generator(PairClassifier(LogisticRegression(max_iter=1000))):
        name = check.func.__name__
        if name != "check_array_api_input":
            yield pytest.param(estimator, check, id=f"{name}-{'-'.join(map(str, check.keywords.values()))}")


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_checks(estimator, check):
    check(estimator)
