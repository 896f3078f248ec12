"""Recipe: a mixture learns from many rows without labels, and few labels then say what its components mean."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mixtura.density import GaussianMixture

K, D = 10, 20


def pretrained(mixture):
    """Responsibilities of a fitted mixture as features; labels train what comes after it alone."""
    return make_pipeline(FrozenEstimator(mixture), LogisticRegression(C=10))


@pytest.fixture(scope="module")
def tables():
    X, component, centers = make_blobs(4000, D, centers=K, cluster_std=1.5, random_state=0, return_centers=True)
    return X, component, component % 2, centers


def test_a_few_labels_for_each_component_are_enough_when_components_are_known(tables):
    X, component, y, centers = tables
    known = GaussianMixture.from_parameters(np.full(K, 1 / K), centers, np.full((K, D), 1.5**2))
    n = int(np.ceil(K * np.log(K)))  # labels until each component has been seen, in expectation
    rng, scores = np.random.default_rng(0), []
    for _ in range(20):
        some = rng.choice(len(X), n, replace=False)
        seen = np.isin(component, component[some])
        model = pretrained(known).fit(X[some], y[some])
        scores.append(model.score(X[seen], y[seen]))
        table = {c: y[component == c][0] for c in component[some]}  # what a component means, looked up
        by_table = np.array([table[c] for c in known.predict(X[seen])])
        assert (model.predict(X[seen]) == by_table).mean() > 0.95
    assert np.mean(scores) > 0.99


def test_rows_without_labels_are_worth_labels(tables):
    X, _, y, _ = tables
    some = np.random.default_rng(1).choice(2000, 40, replace=False)
    mixture = GaussianMixture(K, covariance="EII", n_init=3, random_state=0).fit(X[:2000])
    before = {name: value.copy() for name, value in vars(mixture).items() if isinstance(value, np.ndarray)}
    few = LogisticRegression(C=10).fit(X[some], y[some]).score(X[2000:], y[2000:])
    both = pretrained(mixture).fit(X[some], y[some]).score(X[2000:], y[2000:])
    assert 1 - both < 0.5 * (1 - few)
    assert all((getattr(mixture, name) == value).all() for name, value in before.items())  # it stays as it was


def test_without_rows_that_have_no_labels_the_mixture_is_that_of_the_labeled_rows(tables):
    X, _, y, _ = tables
    options = {"n_components": 4, "covariance": "EII", "random_state": 0}
    model = pretrained(GaussianMixture(**options).fit(X[:40])).fit(X[:40], y[:40])
    features = GaussianMixture(**options).fit_transform(X[:40])
    by_hand = LogisticRegression(C=10).fit(features, y[:40])
    assert (model[-1].coef_ == by_hand.coef_).all()


def test_in_a_pipeline_that_is_not_frozen_the_mixture_is_learned_without_labels(tables):
    X, _, y, _ = tables
    mixture = GaussianMixture(2, covariance="EII", random_state=0)
    model = make_pipeline(mixture, LogisticRegression()).fit(X[:40], y[:40])
    assert (model[0].means_ == clone(mixture).fit(X[:40]).means_).all()
