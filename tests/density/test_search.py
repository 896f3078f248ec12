"""A search fits every candidate and chooses by a criterion; the answers on real tables are those of mclust."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import KFold

from density.tables import rows, with_holes
from mixtura.core.errors import MixturaWarning, OptionError, ShapeError, UnknownNameError
from mixtura.density import FAMILIES, GaussianMixture, MixtureSearch, SingularComponentError
from mixtura.density._candidates import distinct_families
from mixtura.density.families import find_family

TABLES = json.loads((Path(__file__).parent / "fixtures" / "mclust.json").read_text())["tables"]
SMALL = {"covariance": ["EII", "VVV"], "random_state": 0}
edge_allowed = pytest.mark.filterwarnings(
    "ignore:the best candidate has the largest:mixtura.core.errors.MixturaWarning"
)


@edge_allowed
@pytest.mark.parametrize(("name", "family", "k", "bic"), [("iris", "VEV", 2, 561.73), ("faithful", "EEE", 3, 2314.4)])
def test_the_well_known_answers(name, family, k, bic):
    found = MixtureSearch(range(1, 5), random_state=0).fit(np.array(TABLES[name]["data"]))
    assert found.best_.covariance == family
    assert found.best_.n_components == k
    assert found.best_.score < bic + 0.1


@edge_allowed
def test_every_candidate_is_there_and_the_best_comes_first():
    X, _ = rows()
    found = MixtureSearch(range(1, 4), random_state=0, init="kmeans", mixture=GaussianMixture(tol=1e-3)).fit(X)
    scores = [one.score for one in found.candidates_]
    assert scores == sorted(scores)
    assert found.candidates_[0] == found.best_
    assert len(found.candidates_) == 2 * 14 + 3
    best = found.best_estimator_
    assert (best.n_components, best.covariance, best.init) == found.best_[:3]
    assert found.best_.score == pytest.approx(best.bic(X))
    assert found.best_.log_likelihood == pytest.approx(best.score(X) * len(X))
    assert np.array_equal(found.predict(X), best.predict(X))
    assert np.array_equal(found.transform(X), best.predict_proba(X))
    assert found.score(X) == best.score(X)
    assert found.get_feature_names_out()[0] == "mixturesearch0"


@pytest.mark.parametrize("criterion", ["bic", "icl", "aic", "cv"])
@edge_allowed
def test_criteria(criterion):
    X, _ = rows()
    weights = np.random.default_rng(0).uniform(0.5, 2, len(X))
    found = MixtureSearch([2, 3], criterion=criterion, cv=4, init="random", **SMALL).fit(X, sample_weight=weights)
    if criterion != "cv":
        assert found.best_.score == pytest.approx(getattr(found.best_estimator_, criterion)(X, weights))
        return
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    one = GaussianMixture(found.best_.n_components, covariance=found.best_.covariance, tol=1e-5, max_iter=1000)
    one.set_params(init="random", random_state=seed)
    total = 0.0
    for train, test in KFold(4, shuffle=True, random_state=seed).split(X):
        one.fit(X[train], sample_weight=weights[train])
        total -= 2 * weights[test] @ one.score_samples(X[test])
    assert found.best_.score == pytest.approx(total, rel=1e-6)


@edge_allowed
def test_results_do_not_depend_on_processes_or_on_the_other_candidates():
    X, _ = rows()
    one = MixtureSearch([1, 2, 3], **SMALL).fit(X)
    two = MixtureSearch([1, 2, 3], n_jobs=2, **SMALL).fit(X)
    assert one.candidates_ == two.candidates_
    assert np.array_equal(one.best_estimator_.means_, two.best_estimator_.means_)
    alone = MixtureSearch(one.best_.n_components, **{**SMALL, "covariance": one.best_.covariance}).fit(X)
    assert alone.best_ == one.best_


@edge_allowed
def test_what_a_mixture_can_do_a_search_can():
    """Missing values, weights, labels, a noise component, float32."""
    X, which = rows()
    weights = np.where(np.arange(len(X)) % 5 == 0, 0.0, 1.0)
    found = MixtureSearch([2, 3], **SMALL).fit(with_holes(X), sample_weight=weights)
    kept = MixtureSearch([2, 3], **SMALL).fit(with_holes(X)[weights > 0])
    assert found.best_[:3] == kept.best_[:3]
    assert found.best_.score == pytest.approx(kept.best_.score, rel=1e-9)
    labels = np.where(np.arange(len(X)) % 4 == 0, which, -1)
    named = MixtureSearch(range(1, 4), **SMALL).fit(X, labels=labels)
    assert {one.n_components for one in named.candidates_} == {3}
    assert (named.predict(X) == which).mean() > 0.8
    soft = MixtureSearch(range(1, 5), **SMALL).fit(X, labels=np.where(labels[:, None] >= 0, np.eye(3)[which], 1.0))
    assert {one.n_components for one in soft.candidates_} == {3}
    noisy = MixtureSearch([2], mixture=GaussianMixture(noise_component=True, tol=1e-4), **SMALL).fit(X)
    assert noisy.best_estimator_.noise_weight_ > 0
    assert MixtureSearch([2], **SMALL).fit(X.astype("f4")).transform(X.astype("f4")).dtype == np.float32


def test_same_models_are_tried_once():
    families = [find_family(name) for name in FAMILIES]

    def names(K, D):
        return [family.name for family in distinct_families(families, K, D)]

    assert names(3, 2) == list(FAMILIES)
    assert names(1, 2) == ["EII", "EEI", "EEE"]
    assert names(3, 1) == ["EII", "VII"]
    assert names(1, 1) == ["EII"]


def test_what_cannot_be_fitted_is_told_and_passed_over():
    X = np.vstack([np.tile([1.0, 2], (5, 1)), np.random.default_rng(0).normal(size=(12, 2))])
    found = MixtureSearch([1, 2, 30], mixture=GaussianMixture(reg_covar=0), random_state=0).fit(X)
    failed = [one for one in found.candidates_ if one.error]
    assert {one.n_components for one in failed} == {2, 30}
    assert all(one.score == np.inf for one in failed)
    assert any("not positive definite" in one.error for one in failed)
    assert any("n_components=30 is more than the 17 rows" in one.error for one in failed)
    with pytest.raises(
        OptionError, match="no candidate could be fitted to n_samples=17; of n_components=30: n_components=30 is"
    ):
        MixtureSearch([30]).fit(X)
    with pytest.raises(SingularComponentError, match="column 0 of X has the same value in every row"):
        GaussianMixture(reg_covar=0).fit(X[:5])


def test_what_has_collapsed_to_rounding_does_not_win():
    generator = np.random.default_rng(0)
    tight = 10 * (1 + 1e-12 * generator.integers(0, 4, (20, 2)))
    X = np.vstack([tight, generator.normal(size=(40, 2))])
    assert GaussianMixture(2, covariance="VVI", reg_covar=0, init=(np.arange(60) > 19) * 1).fit(X).bic(X) < -1000
    found = MixtureSearch([1, 2], covariance="VVI", random_state=0).fit(X)
    assert found.best_.score > 0
    assert any("has collapsed to the rounding of the data" in one.error for one in found.candidates_)


def test_the_edge_of_the_range_is_told():
    X, _ = rows()
    with pytest.warns(MixturaWarning, match="the largest n_components that was tried, 2; try more"):
        MixtureSearch([1, 2], **SMALL).fit(X)


def test_wrong_options_are_refused():
    X, _ = rows()
    wrong = [
        ({"n_components": []}, OptionError, "n_components must name at least one"),
        ({"n_components": [0]}, OptionError, "n_components must be a whole number of at least 1"),
        ({"covariance": ["round"]}, UnknownNameError, "unknown covariance family 'round'"),
        ({"criterion": "sic"}, OptionError, "criterion must be one of bic, icl, aic, cv, got 'sic'"),
        ({"init": "sdp"}, OptionError, "init must be of kmeans, "),
        ({"cv": 1}, OptionError, "cv must be a whole number of at least 2"),
    ]
    for options, error, text in wrong:
        with pytest.raises(error, match=text):
            MixtureSearch(**options).fit(X)
    with pytest.raises(ShapeError, match="labels have 7 columns, and no n_components tried is as large"):
        MixtureSearch([2]).fit(X, labels=np.ones((200, 7)))
