"""What fitting promises: parity with scikit-learn, weights, labels, a likelihood that never falls, and no NaN."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from density.tables import degenerate_tables, responsibilities, rows, same
from mixtura.core.errors import MixturaError, MixturaWarning, OptionError, ShapeError, UnknownNameError
from mixtura.density import (
    FAMILIES,
    NIW,
    BayesianGaussianMixture,
    GaussianMixture,
    MaxConditionNumber,
    MinWeight,
    MixtureSearch,
    MustLink,
    SingularComponentError,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("algorithm", ["gemm", "cholesky"])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_ten_iterations_are_those_of_scikit_learn(kind, algorithm):
    X, _ = rows(offset=10)
    start = responsibilities()
    ours = GaussianMixture(3, covariance=kind, init=start, tol=0, max_iter=10, algorithm=algorithm).fit(X)
    first = GaussianMixture(3, covariance=kind, init=start, max_iter=0).fit(X).to_sklearn()
    theirs = SklearnMixture(
        3,
        covariance_type=kind,
        tol=0,
        max_iter=10,
        weights_init=first.weights_,
        means_init=first.means_,
        precisions_init=first.precisions_,
    ).fit(X)
    theirs_as_ours = GaussianMixture.from_sklearn(theirs)
    same(ours, theirs_as_ours, rtol=1e-10)
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-10)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.bic(X) == pytest.approx(theirs.bic(X), rel=1e-8)
    assert ours.aic(X) == pytest.approx(theirs.aic(X), rel=1e-8)


@pytest.mark.parametrize("columns", [2, 23, 24, 40])
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_every_way_to_compute_gives_the_same(kind, columns):
    """Narrow and wide tables take products, own factors, or a shared factor; float32 is near."""
    X, _ = rows(400, columns, offset=5)
    options = {"covariance": kind, "init": responsibilities(400), "tol": 0, "max_iter": 6, "reg_covar": 1e-3}
    found = [GaussianMixture(3, algorithm=name, **options).fit(X) for name in ("auto", "gemm", "cholesky")]
    for other in found[1:]:
        same(found[0], other, rtol=1e-8)
        np.testing.assert_allclose(found[0].score_samples(X), other.score_samples(X), rtol=1e-9)
    single = GaussianMixture(3, **options).fit(X.astype("f4"))
    np.testing.assert_allclose(single.means_, found[0].means_, rtol=2e-3, atol=2e-3)
    weights = np.random.default_rng(0).integers(0, 3, 400)
    heavy = GaussianMixture(3, **options).fit(X, sample_weight=weights)
    options["init"] = np.repeat(options["init"], weights, 0)
    same(heavy, GaussianMixture(3, algorithm="cholesky", **options).fit(np.repeat(X, weights, 0)), rtol=1e-8)


@pytest.mark.parametrize("family", ["VVV", "EEE", "VVI"])
def test_threads_do_not_change_results(family):
    X, _ = rows(2000)
    for table in (X, np.where(np.arange(3) == np.arange(2000)[:, None] % 7, np.nan, X)):
        options = {"covariance": family, "batch_size": 97, "tol": 0, "max_iter": 4, "random_state": 0}
        one, three = (GaussianMixture(3, n_jobs=n_jobs, **options).fit(table) for n_jobs in (1, 3))
        for name in ("weights_", "means_", "covariances_", "lower_bounds_"):
            assert np.array_equal(getattr(one, name), getattr(three, name))


@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
def test_threads_are_used(estimator, monkeypatch):
    asked = []

    def in_threads(work, given, n_jobs):
        asked.append(n_jobs)
        return (work(*one) for one in given)

    monkeypatch.setattr("mixtura.density._em.in_threads", in_threads)
    estimator(3, n_jobs=3, max_iter=2, random_state=0).fit(rows()[0])
    assert asked == [3, 3]


def test_errors_in_threads_are_those_without():
    X, _ = rows(500)
    certain = GaussianMixture.from_parameters([1, 0], X[:2], [np.eye(3)] * 2)
    certain.set_params(warm_start=True, batch_size=50)
    for n_jobs in (1, 2):
        with pytest.raises(OptionError, match="X holds a row whose density is 0"):
            certain.set_params(n_jobs=n_jobs).fit(X, labels=np.where(np.arange(500) == 499, 1, -1))


@pytest.mark.filterwarnings("ignore:reg_covar")
def test_pooled_moments_know_priors_noise_and_links():
    X, _ = rows()
    for extra in ({"prior": NIW()}, {"noise_component": True}, {"constraints": MustLink([[0, 1]])}, {"reg_covar": 2.0}):
        options = {"covariance": "EEE", "tol": 0, "max_iter": 6, "init": responsibilities(), **extra}
        found = [GaussianMixture(3, algorithm=name, **options).fit(X) for name in ("auto", "cholesky")]
        same(*found, rtol=1e-9)
        np.testing.assert_allclose(found[0].lower_bounds_, found[1].lower_bounds_, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_never_falls(family):
    X, _ = rows()
    ours = GaussianMixture(3, covariance=family, init=responsibilities(), reg_covar=0, tol=0, max_iter=60).fit(X)
    assert np.diff(ours.lower_bounds_).min() > -1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", ["auto", "gemm", "cholesky"])
def test_chunks_do_not_change_results(family, algorithm):
    X, _ = rows()
    options = {"covariance": family, "init": responsibilities(), "tol": 0, "max_iter": 5, "algorithm": algorithm}
    same(GaussianMixture(3, **options).fit(X), GaussianMixture(3, batch_size=7, **options).fit(X), rtol=1e-9)


@pytest.mark.parametrize("family", ["VVV", "EEE", "VVI", "VEV"])
def test_whole_weights_are_repeated_rows(family):
    X, _ = rows()
    weights = np.random.default_rng(3).integers(0, 4, len(X))
    options = {"covariance": family, "max_iter": 20, "tol": 0, "random_state": 0}
    weighted = GaussianMixture(3, **options).fit(X, sample_weight=weights)
    repeated = GaussianMixture(3, **options).fit(np.repeat(X, weights, axis=0))
    same(weighted, repeated, rtol=1e-9)
    given = GaussianMixture(3, init=responsibilities(), covariance=family, max_iter=1, tol=0, reg_covar=0)
    weighted = given.fit(X, sample_weight=weights).covariances_
    given.set_params(init=np.repeat(responsibilities(), weights, axis=0))
    np.testing.assert_allclose(weighted, given.fit(np.repeat(X, weights, axis=0)).covariances_, rtol=1e-12, atol=1e-12)
    assert given.bic(X, weights) == pytest.approx(given.bic(np.repeat(X, weights, axis=0)), rel=1e-12)
    assert given.icl(X, weights) == pytest.approx(given.icl(np.repeat(X, weights, axis=0)), rel=1e-12)


def test_a_row_of_weight_0_is_not_there():
    X, _ = rows()
    weights = np.ones(len(X))
    weights[::3] = 0
    far = np.where(weights[:, None] > 0, X, 1e9)
    kept = GaussianMixture(3, random_state=0).fit(X[weights > 0], sample_weight=weights[weights > 0])
    assert np.array_equal(GaussianMixture(3, random_state=0).fit(far, sample_weight=weights).means_, kept.means_)


def test_scaled_weights_change_only_bic():
    X, _ = rows()
    weights = np.random.default_rng(3).uniform(0.5, 2, len(X))
    one = GaussianMixture(3, random_state=0, tol=0, max_iter=20).fit(X, sample_weight=weights)
    ten = GaussianMixture(3, random_state=0, tol=0, max_iter=20).fit(X, sample_weight=10 * weights)
    same(one, ten, rtol=1e-9)
    assert one.score(X, sample_weight=weights) == pytest.approx(ten.score(X, sample_weight=10 * weights), rel=1e-12)
    assert ten.bic(X, 10 * weights) - 10 * one.bic(X, weights) == pytest.approx(
        one.n_parameters_ * (np.log(10 * weights.sum()) - 10 * np.log(weights.sum())), rel=1e-9
    )


@pytest.mark.parametrize(
    ("family", "peer"), [("VVV", QuadraticDiscriminantAnalysis()), ("EEE", LinearDiscriminantAnalysis())]
)
def test_all_labels_given_is_discriminant_analysis(family, peer):
    X, y = rows()
    ours = GaussianMixture(3, covariance=family, reg_covar=0, max_iter=1, tol=0).fit(X, labels=y)
    np.testing.assert_allclose(ours.means_, [X[y == k].mean(0) for k in range(3)], rtol=1e-12)
    np.testing.assert_allclose(ours.weights_, np.bincount(y) / len(y), rtol=1e-12)
    within = np.stack([np.cov(X[y == k].T, bias=True) for k in range(3)])
    if family == "VVV":
        np.testing.assert_allclose(ours.covariances_, within, rtol=1e-10)
        peer.set_params(priors=ours.weights_, store_covariance=True).fit(X, y)
        np.testing.assert_allclose(ours.covariances_, np.stack(peer.covariance_), rtol=1e-9)
    else:
        peer.set_params(solver="lsqr", store_covariance=True).fit(X, y)
        np.testing.assert_allclose(ours.covariances_, np.stack([peer.covariance_] * 3), rtol=1e-9)
        np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), atol=1e-9)


def test_labels_unknown_everywhere_change_nothing():
    X, _ = rows()
    plain, unknown = (GaussianMixture(3, random_state=0).fit(X, labels=y) for y in (None, np.full(len(X), -1)))
    assert np.array_equal(plain.means_, unknown.means_)
    soft = GaussianMixture(3, random_state=0).fit(X, labels=np.ones((len(X), 3)))
    same(plain, soft, rtol=1e-9)


def test_some_labels_name_the_components():
    X, which = rows()
    for order in ([0, 1, 2], [2, 0, 1]):
        y = np.where(np.arange(len(X)) % 10 == 0, np.array(order)[which], -1)
        ours = GaussianMixture(3, random_state=0).fit(X, labels=y)
        assert (ours.predict(X) == np.array(order)[which]).mean() > 0.85
    hard = GaussianMixture(3, random_state=0, tol=0, max_iter=5).fit(X, labels=y)
    soft = np.where(y[:, None] >= 0, np.eye(3)[y], 1.0)
    same(hard, GaussianMixture(3, random_state=0, tol=0, max_iter=5).fit(X, labels=soft), rtol=1e-9)


@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
@pytest.mark.parametrize(
    ("value", "seen"), [(0.5, "0.5"), (np.nan, "nan"), (3, "3"), (-2, "-2"), ("a", "'"), (None, "None")]
)
def test_what_cannot_be_labels_is_refused(estimator, value, seen):
    X, which = rows()
    labels = [value if i == 7 else int(k) for i, k in enumerate(which)]
    accepted = r"labels must be components from 0 to 2, or -1 where unknown, got "
    for fit in (estimator(3).fit, estimator(3).fit_predict, estimator(3).partial_fit):
        with pytest.raises(OptionError, match=f"{accepted}{seen}"):
            fit(X, labels=labels)
    with pytest.raises(ShapeError, match=r"labels must have one for each of 200 rows, got shape \(\)"):
        estimator(3).fit(X, labels=3)
    soft = np.eye(3)[which]
    soft[5] = [0, -1, 2]
    with pytest.raises(OptionError, match=r"labels must be finite, not negative, .* got a row \[0.0, -1.0, 2.0\]"):
        estimator(3).fit(X, labels=soft)


@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
def test_the_target_of_a_pipeline_is_no_label(estimator):
    X, which = rows()
    plain = estimator(3, random_state=0, max_iter=500).fit(X)
    for y in (
        which,
        np.array(list("abc"))[which],
        np.where(which == 0, -1, 1),
        X[:, 0],
        X[:, :2],
        np.eye(3)[which] * 7,
    ):
        piped = Pipeline([("mixture", clone(plain)), ("last", FunctionTransformer())]).fit(X, y)["mixture"]
        assert np.array_equal(piped.means_, plain.means_)
        assert np.array_equal(clone(plain).fit(X, y).means_, plain.means_)
        assert np.array_equal(clone(plain).fit_predict(X, y), plain.predict(X))
    same = [clone(plain).partial_fit(X, y).means_ for y in (None, which)]
    assert np.array_equal(*same)
    known = Pipeline([("mixture", clone(plain))]).fit(X, mixture__labels=which)["mixture"]
    assert not np.allclose(known.means_, plain.means_)


@pytest.mark.parametrize("estimator", [GaussianMixture(3), BayesianGaussianMixture(3), MixtureSearch([2, 3])])
def test_labels_in_the_place_of_a_target_are_refused(estimator):
    X, which = rows()
    for y in (np.where(which == 0, 0, -1), np.where(which == 0, -1, which), np.where(which == 0, -1.0, which)):
        with pytest.raises(OptionError, match=r"y is ignored, but holds -1 beside other classes, .* pass labels="):
            clone(estimator).fit(X, y)
    soft = np.where((which == 0)[:, None], 1.0, np.eye(3)[which])
    for y in (np.eye(3)[which], soft, np.full((200, 3), 1 / 3)):
        with pytest.raises(OptionError, match="y is ignored, but holds probabilities of components"):
            clone(estimator).fit_predict(X, y)
    if hasattr(estimator, "partial_fit"):
        with pytest.raises(OptionError, match="pass labels="):
            clone(estimator).partial_fit(X, soft)


def test_float32_stays_close_and_keeps_its_type():
    X, _ = rows(offset=100)
    double = GaussianMixture(3, init=responsibilities(), tol=0, max_iter=10)
    for algorithm in ("gemm", "cholesky"):
        single = GaussianMixture(3, init=responsibilities(), tol=0, max_iter=10, algorithm=algorithm).fit(
            X.astype("f4")
        )
        np.testing.assert_allclose(single.means_, double.fit(X).means_, rtol=1e-4)
        assert single.predict_proba(X.astype("f4")).dtype == np.float32


def test_torch_tensors_come_in():
    import torch

    X, y = rows()
    ours = GaussianMixture(3, random_state=0).fit(
        torch.tensor(X), labels=torch.tensor(y), sample_weight=torch.ones(len(X))
    )
    assert np.array_equal(ours.predict(torch.tensor(X)), ours.predict(X))
    assert np.array_equal(
        ours.means_, GaussianMixture(3, random_state=0).fit(X, labels=y, sample_weight=np.ones(len(X))).means_
    )


def test_frames_and_named_output():
    import pandas

    X, _ = rows()
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    ours = GaussianMixture(3, random_state=0).fit(frame).set_output(transform="pandas")
    out = ours.transform(frame)
    assert list(out.columns) == ["gaussianmixture0", "gaussianmixture1", "gaussianmixture2"]
    np.testing.assert_array_equal(out.to_numpy(), ours.predict_proba(frame))
    with pytest.raises(ValueError, match="feature names"):
        ours.predict(frame[["b", "a", "c"]])


def test_tiny_components_far_apart_keep_their_digits():
    generator = np.random.default_rng(0)
    unit = generator.normal(size=(400, 2))
    which = np.repeat([0, 1], 200)
    X = 1e-6 * unit + which[:, None]
    ours = GaussianMixture(2, reg_covar=0, random_state=0).fit(X)
    order = np.argsort(ours.means_[:, 0])
    expected = [np.cov(X[which == k].T, bias=True) for k in range(2)]
    np.testing.assert_allclose(ours.covariances_[order], expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [1e6, 1e8])
def test_far_from_the_origin(offset):
    X, _ = rows()
    near = GaussianMixture(3, random_state=0, init=responsibilities()).fit(X)
    far = GaussianMixture(3, random_state=0, init=responsibilities()).fit(X + offset)
    np.testing.assert_allclose(far.covariances_, near.covariances_, rtol=1e-5, atol=1e-5)
    assert far.score(X + offset) == pytest.approx(near.score(X), abs=1e-6)


@pytest.mark.parametrize("factor", [1e-120, 1e-9, 1e9, 1e120])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_do_not_matter(family, factor):
    X, _ = rows(120)
    options = {"covariance": family, "init": responsibilities(120), "reg_covar": 0, "tol": 0, "max_iter": 8}
    one, other = GaussianMixture(3, **options).fit(X), GaussianMixture(3, **options).fit(X * factor)
    np.testing.assert_allclose(other.means_ / factor, one.means_, rtol=1e-6)
    np.testing.assert_allclose(other.covariances_ / factor**2, one.covariances_, rtol=1e-5, atol=1e-8)
    assert other.lower_bound_ + X.shape[1] * np.log(factor) == pytest.approx(one.lower_bound_, abs=1e-6)


@pytest.mark.parametrize("family", ["VVV", "EEE", "EII", "VII", "EEV", "VEV", "EVV"])
def test_rotation_rotates(family):
    X, _ = rows()
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    options = {"covariance": family, "init": responsibilities(), "reg_covar": 0, "tol": 0, "max_iter": 5}
    one, other = GaussianMixture(3, **options).fit(X), GaussianMixture(3, **options).fit(X @ turn)
    np.testing.assert_allclose(other.means_, one.means_ @ turn, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(other.covariances_, turn.T @ one.covariances_ @ turn, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_columns_and_components_does_not_matter(family):
    X, _ = rows()
    options = {"covariance": family, "reg_covar": 0, "tol": 0, "max_iter": 4}
    one = GaussianMixture(3, init=responsibilities(), **options).fit(X)
    other = GaussianMixture(3, init=responsibilities()[:, [2, 0, 1]], **options).fit(X[:, [1, 2, 0]])
    np.testing.assert_allclose(other.means_, one.means_[[2, 0, 1]][:, [1, 2, 0]], rtol=1e-5)


@pytest.mark.filterwarnings("ignore::mixtura.core.errors.MixturaWarning")
@given(
    degenerate_tables(),
    st.integers(1, 5),
    st.sampled_from(FAMILIES),
    st.sampled_from([0.0, 1e-6]),
    st.sampled_from(["kmeans", "whitened-kmeans", "hierarchical", "random"]),
)
def test_degenerate_data_fit_or_are_refused_by_name(X, k, family, reg_covar, init):
    mixture = GaussianMixture(k, covariance=family, reg_covar=reg_covar, init=init, random_state=0, max_iter=10)
    try:
        mixture.fit(X)
    except MixturaError as error:
        assert len(str(error)) > 20  # noqa: PT017
        return
    for value in (mixture.weights_, mixture.means_, mixture.covariances_, mixture.score_samples(X)):
        assert np.isfinite(value).all()
    assert mixture.weights_.sum() == pytest.approx(1)
    np.testing.assert_allclose(mixture.predict_proba(X).sum(1), 1, rtol=1e-9)
    deviations = np.sqrt(np.diagonal(mixture.covariances_, 0, 1, 2))
    assert np.linalg.eigvalsh(mixture.covariances_ / deviations[:, :, None] / deviations[:, None]).min() > 0


def test_failures_have_names():
    X, _ = rows()
    with pytest.raises(SingularComponentError, match="component 0 has a covariance that is not positive definite"):
        GaussianMixture(1, reg_covar=0).fit(np.c_[X, X[:, 0]])
    with pytest.raises(OptionError, match="n_components=5 is more than the 4 rows"):
        GaussianMixture(5).fit(X[:4])
    with pytest.raises(OptionError, match="n_components=3 is more than the 2 distinct rows"):
        GaussianMixture(3).fit(np.repeat(X[:2], 5, axis=0))
    with pytest.raises(OptionError, match="n_components must be a whole number of at least 1, got 0"):
        GaussianMixture(0).fit(X)
    with pytest.raises(OptionError, match="tol must be a number of at least 0"):
        GaussianMixture(tol=-1).fit(X)
    with pytest.raises(OptionError, match="algorithm must be one of auto, gemm, cholesky"):
        GaussianMixture(algorithm="svd").fit(X)
    with pytest.raises(UnknownNameError, match="unknown covariance family 'round'"):
        GaussianMixture(covariance="round").fit(X)
    with pytest.raises(OptionError, match="init must be one of kmeans"):
        GaussianMixture(2, init="sdp").fit(X)
    with pytest.raises(ShapeError, match=r"init must be responsibilities \(200, 2\)"):
        GaussianMixture(2, init=np.ones((200, 3))).fit(X)
    with pytest.raises(ShapeError, match="labels must have one for each of 200 rows"):
        GaussianMixture(2).fit(X, labels=[0, 1])
    with pytest.raises(ValueError, match="at least one non-zero"):
        GaussianMixture(2).fit(X, sample_weight=np.zeros(200))
    with pytest.raises(OptionError, match="X must lie within"):
        GaussianMixture().fit(X * 1e160)


def test_starts_compete_and_go_on():
    X, _ = rows()
    single = [GaussianMixture(4, init="random", random_state=seed, max_iter=3).fit(X).lower_bound_ for seed in range(3)]
    several = GaussianMixture(4, init="random", random_state=0, n_init=5, max_iter=3).fit(X)
    assert several.lower_bound_ >= single[0]
    begun = GaussianMixture(3, init=responsibilities(), tol=0, max_iter=4).fit(X)
    whole = GaussianMixture(3, init=responsibilities(), tol=0, max_iter=8).fit(X)
    same(begun.set_params(warm_start=True).fit(X), whole, rtol=1e-12)


@pytest.mark.parametrize("init", ["kmeans", "whitened-kmeans", "hierarchical"])
def test_starts_find_plain_clusters(init):
    generator = np.random.default_rng(0)
    which = np.repeat(np.arange(3), 50)
    X = generator.normal(size=(150, 2)) + 12 * np.eye(3)[which][:, :2]
    found = GaussianMixture(3, init=init, random_state=0).fit_predict(X)
    assert len({tuple(pair) for pair in zip(found.tolist(), which.tolist(), strict=True)}) == 3


def test_not_converged_is_said():
    X, _ = rows()
    with pytest.warns(ConvergenceWarning, match="EM stopped after max_iter=1"):
        GaussianMixture(3, max_iter=1).fit(X)


@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
def test_a_reg_covar_that_is_much_of_a_variance_is_told(estimator):
    import pandas

    X, _ = rows()
    narrow = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1], "height": 1e-3 * X[:, 2] / X[:, 2].std()})
    text = r"reg_covar=1e-06 is 1 times the variance of column 'height' of X, .* rescale the column, or give a smaller"
    for fit in (estimator(2, random_state=0, max_iter=500).fit, estimator(2, random_state=0).partial_fit):
        with pytest.warns(MixturaWarning, match=text):
            fit(narrow)
    estimator(2, random_state=0, max_iter=500, reg_covar=[1e-6, 1e-6, 1e-12]).fit(narrow)
    constant = np.c_[X[:, :2], np.full(len(X), 0.1), np.full(len(X), np.nan)]
    with pytest.warns(MixturaWarning, match="hold no value") as seen:
        estimator(2, random_state=0, max_iter=500).fit(constant)
    assert len(seen) == 1


def test_a_reg_covar_for_each_column():
    X, _ = rows()
    options = {"init": responsibilities(), "max_iter": 5, "tol": 0}
    for family in ("VVV", "VVI", "EEE"):
        plain = GaussianMixture(3, covariance=family, reg_covar=1e-3, **options).fit(X)
        units = np.array([1, 10, 0.1])
        other = GaussianMixture(3, covariance=family, reg_covar=1e-3 * units**2, **options).fit(X * units)
        np.testing.assert_allclose(other.covariances_, plain.covariances_ * np.outer(units, units), rtol=1e-8)
    with pytest.raises(ShapeError, match=r"reg_covar must be a number or \(3,\), got shape \(2,\)"):
        GaussianMixture(reg_covar=[1, 2]).fit(X)
    with pytest.raises(OptionError, match="reg_covar must be finite and not negative"):
        GaussianMixture(reg_covar=[1, 2, -3]).fit(X)


def test_a_prior_without_psi_does_not_save_a_constant_column():
    X, _ = rows()
    constant = np.c_[X, np.ones(len(X))]
    with pytest.raises(SingularComponentError, match=r"column 3 of X .* give a reg_covar or a prior with a psi"):
        GaussianMixture(2, reg_covar=0, prior=NIW()).fit(constant)
    given = GaussianMixture(2, reg_covar=0, prior=NIW(psi=1.0), random_state=0).fit(constant)
    assert np.isfinite(given.score(constant))


@pytest.mark.parametrize("score", ["score", "bic", "aic", "icl"])
def test_weights_of_scores_are_checked(score):
    X, _ = rows()
    ours = GaussianMixture(3, random_state=0).fit(X)
    weights = np.arange(200) % 3
    found = getattr(ours, score)(X, sample_weight=weights)
    assert found == pytest.approx(getattr(ours, score)(np.repeat(X, weights, 0)), rel=1e-12)
    for wrong in (np.full(200, np.nan), np.where(np.arange(200) == 3, -1, 1), np.ones(3), np.zeros(200)):
        with pytest.raises(ValueError, match=r"(?i)sample[_ ]weight"):
            getattr(ours, score)(X, sample_weight=wrong)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e-6, 1e20])
@pytest.mark.parametrize("options", [{}, {"covariance": "EEE"}, {"covariance": "VVI", "noise_component": True}])
def test_the_scale_of_weights_does_not_matter(options, scale):
    X, _ = rows()
    X[0, 0] = np.nan
    one, other = (
        GaussianMixture(3, random_state=0, **options).fit(X, sample_weight=w * np.ones(200)) for w in (1, scale)
    )
    same(one, other, rtol=1e-6)
    assert one.score(X) == pytest.approx(other.score(X), rel=1e-6)


def test_the_box_of_the_noise_knows_weights():
    X, _ = rows()
    X, weights = X @ [[1, 5, 0], [0, 1, 0], [0, 0, 1]], np.where(np.arange(200) < 100, 1, 9)
    ours = GaussianMixture(2, noise_component=True, random_state=0, max_iter=500)
    found = ours.fit(X, sample_weight=weights).noise_log_density_
    assert found == pytest.approx(ours.fit(np.repeat(X, weights, 0)).noise_log_density_, rel=1e-12)
    assert found != pytest.approx(ours.fit(X).noise_log_density_, rel=1e-6)


def test_no_iterations_are_no_convergence():
    ours = GaussianMixture(3, max_iter=0, random_state=0).fit(rows()[0])
    assert (ours.converged_, ours.n_iter_, ours.lower_bound_) == (False, 0, -np.inf)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prior": "x"}, "prior must be a NIW or None, got 'x'"),
        ({"prior": NIW}, "prior must be a NIW or None, got <class"),
        ({"prior": NIW(kappa="a")}, "prior needs numbers as kappa, got 'a'"),
        ({"prior": NIW(nu=np.nan)}, "prior needs a finite nu, got nan"),
        ({"prior": NIW(mean=[np.nan] * 3)}, r"prior needs a finite mean, got \[nan"),
        ({"prior": NIW(psi=[[1, 2], "a"])}, "prior needs numbers as psi"),
        ({"random_state": np.random.default_rng(0)}, "random_state must be None, a whole number .* got Generator"),
        ({"random_state": "a"}, "random_state must be .* got 'a'"),
        ({"warm_start": "no"}, "warm_start must be True or False, got 'no'"),
        ({"noise_component": "no"}, "noise_component must be True or False, got 'no'"),
        ({"constraints": MinWeight("a")}, "MinWeight needs a minimum between 0 and 1/2, got 'a'"),
        ({"constraints": MaxConditionNumber("a")}, "MaxConditionNumber needs a limit of at least 1, got 'a'"),
    ],
)
def test_options_of_another_kind_are_named(options, text):
    with pytest.raises(OptionError, match=text):
        GaussianMixture(2, **options).fit(rows()[0])


def test_what_is_masked_is_missing():
    X, _ = rows()
    holes = np.where(X > 6, np.nan, X)
    for dtype in ("f8", "f4"):
        masked = GaussianMixture(2, random_state=0).fit(np.ma.masked_greater(X.astype(dtype), 6))
        assert np.array_equal(masked.means_, GaussianMixture(2, random_state=0).fit(holes.astype(dtype)).means_)
    whole = np.ma.masked_equal(np.round(X).astype(int), 3)
    assert np.isfinite(GaussianMixture(2, random_state=0).fit(whole).score(whole))


def test_tensors_of_half_precision_come_in():
    import torch

    X = torch.tensor(rows()[0]).bfloat16()
    ours = GaussianMixture(2, random_state=0).fit(X)
    assert np.array_equal(ours.means_, GaussianMixture(2, random_state=0).fit(X.double().numpy()).means_)


def test_dates_are_no_numbers():
    days = np.arange("2020-01-01", "2020-01-09", dtype="datetime64[D]").reshape(4, 2)
    for times in (days, days - days[0, 0]):
        with pytest.raises(OptionError, match=r"X must hold numbers, got \w+64\[D\]"):
            GaussianMixture().fit(times)
