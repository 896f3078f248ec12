"""``partial_fit``: one batch is one EM iteration, statistics add up, streams converge, drift is followed."""

import numpy as np
import pytest

from density.tables import responsibilities, rows, same, with_holes
from mixtura.core.errors import OptionError
from mixtura.density import FAMILIES, BayesianGaussianMixture, CannotLink, GaussianMixture, MinWeight, MustLink
from mixtura.density._em import expectation
from mixtura.density._parameters import scores_of
from mixtura.density._rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_batch_is_one_iteration(family):
    X, _ = rows()
    options = {"covariance": family, "init": responsibilities()}
    one = GaussianMixture(3, max_iter=1, tol=0, **options).fit(X)
    same(GaussianMixture(3, **options).partial_fit(X), one, rtol=1e-10)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("algorithm", ["gemm", "cholesky"])
def test_statistics_of_two_halves_add_up_to_those_of_the_whole(algorithm, holes):
    X, _ = rows()
    X = with_holes(X) if holes else X
    scores = scores_of(GaussianMixture(3, init=responsibilities()).fit(rows()[0]).parameters_)
    whole = expectation(Rows(X), scores, algorithm=algorithm)
    halves = expectation(Rows(X[:70]), scores, algorithm=algorithm) + expectation(
        Rows(X[70:]), scores, algorithm=algorithm
    )
    halves = halves.about(whole.reference_KD)
    for name in ("count_K", "first_KD", "second", "log_likelihood", "weight"):
        np.testing.assert_allclose(getattr(halves, name), getattr(whole, name), rtol=1e-10, atol=1e-8)


def test_a_stream_comes_close_to_the_fit_of_all():
    X, _ = rows(20_000, seed=5)
    whole = GaussianMixture(3, random_state=0, tol=1e-8).fit(X)
    stream = GaussianMixture(3, random_state=0)
    for part in np.array_split(X, 40):
        stream.partial_fit(part)
    assert stream.n_batches_seen_ == 40
    assert stream.weight_seen_ == 20_000
    assert whole.score(X) - stream.score(X) < 0.01


def test_forgetting_follows_drift():
    generator = np.random.default_rng(0)
    loyal, quick = GaussianMixture(1), GaussianMixture(1)
    for step in range(60):
        batch = generator.normal(size=(50, 2)) + 0.2 * step
        loyal.partial_fit(batch)
        quick.partial_fit(batch, forget=0.5)
    assert abs(quick.means_[0, 0] - 0.2 * 59) < 0.5 < abs(loyal.means_[0, 0] - 0.2 * 59)


def test_weights_and_labels_count_in_a_stream():
    X, which = rows()
    weights = np.random.default_rng(3).integers(1, 4, len(X))
    options = {"init": responsibilities(), "reg_covar": 0}
    heavy = GaussianMixture(3, **options).partial_fit(X, sample_weight=weights)
    many = GaussianMixture(3, **{**options, "init": np.repeat(responsibilities(), weights, 0)})
    same(heavy, many.partial_fit(np.repeat(X, weights, 0)), rtol=1e-9)
    named = GaussianMixture(3, random_state=0).partial_fit(X, labels=which)
    np.testing.assert_allclose(named.means_, [X[which == k].mean(0) for k in range(3)], rtol=1e-9)
    turned = named.partial_fit(X, labels=2 - which, forget=1)  # in later batches too
    np.testing.assert_allclose(turned.means_, [X[which == 2 - k].mean(0) for k in range(3)], rtol=1e-9)


def test_a_batch_of_one_row_is_enough_once_begun():
    X, _ = rows()
    ours = GaussianMixture(3, random_state=0).partial_fit(X)
    before = ours.means_.copy()
    ours.partial_fit(X[:1])
    assert np.isfinite(ours.covariances_).all()
    assert not np.array_equal(ours.means_, before)


def test_wrong_streams_are_refused():
    X, _ = rows()
    with pytest.raises(OptionError, match=r"forget must lie in 0 \.\. 1, got 2"):
        GaussianMixture(2).partial_fit(X, forget=2)
    with pytest.raises(OptionError, match="n_components=3 is more than the 2 rows"):
        GaussianMixture(3).partial_fit(X[:2])
    with pytest.raises(ValueError, match="features"):
        GaussianMixture(2).partial_fit(X).partial_fit(X[:, :2])


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        (GaussianMixture(2), {"covariance": "VVI"}),
        (GaussianMixture(2, covariance="VVI"), {"covariance": "VVV"}),
        (GaussianMixture(2, covariance="EEE"), {"covariance": "VVV"}),
        (BayesianGaussianMixture(2), {"covariance": "diag"}),
        (BayesianGaussianMixture(2), {"weights": "dirichlet"}),
    ],
)
def test_a_stream_does_not_change_its_form(estimator, changes):
    X, _ = rows()
    ours = estimator.set_params(random_state=0).partial_fit(X).set_params(**changes)
    before = ours.means_.copy()
    with pytest.raises(OptionError, match=r"(covariance|weights)='\w+' cannot go on from .*; fit a new mixture"):
        ours.partial_fit(X)
    assert np.array_equal(ours.means_, before)
    if isinstance(ours, BayesianGaussianMixture):
        with pytest.raises(OptionError, match="cannot go on"):
            ours.set_params(warm_start=True).fit(X)


@pytest.mark.parametrize("link", [MustLink([(0, 3)]), [MinWeight(0.1), CannotLink([(0, 3)])]])
def test_links_do_not_go_with_a_stream(link):
    X, _ = rows()
    with pytest.raises(OptionError, match=r"constraints of rows, as \w+Link, do not go with partial_fit"):
        GaussianMixture(2, constraints=link).partial_fit(X)
