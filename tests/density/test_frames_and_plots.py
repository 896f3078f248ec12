"""Frames of pandas and polars come in and go out; plots draw what the mixture says into the axes they are given."""

import subprocess
import sys

import matplotlib
import numpy as np
import pandas
import polars
import pytest
from matplotlib.figure import Figure
from sklearn.base import clone

from density.tables import rows
from mixtura.core.errors import OptionError
from mixtura.density import BayesianGaussianMixture, GaussianMixture, MixtureSearch, SplitMergeMixture
from mixtura.density.plots import plot_components, plot_conditional, plot_criteria, plot_responsibilities

X, WHICH = rows()
NAMES = ["length", "width", "height"]
FRAMES = {"pandas": pandas.DataFrame(X, columns=NAMES), "polars": polars.DataFrame(X, schema=NAMES)}
SEARCH = {"covariance": ["EII", "VVI"], "random_state": 0}


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture(scope="module")
def fitted():
    return GaussianMixture(3, random_state=0).fit(FRAMES["pandas"])


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
def test_frames_come_in_and_go_out(estimator, kind):
    frame = FRAMES[kind]
    ours = estimator(3, random_state=0).fit(frame, sample_weight=np.ones(len(X))).set_output(transform=kind)
    plain = estimator(3, random_state=0).fit(X)
    assert ours.feature_names_in_.tolist() == NAMES
    np.testing.assert_allclose(ours.means_, plain.means_, rtol=1e-12)  # columns lie otherwise in memory
    out = ours.transform(frame)
    assert type(out) is type(frame)
    assert list(out.columns) == [f"{estimator.__name__.lower()}{k}" for k in range(3)]
    np.testing.assert_allclose(out.to_numpy(), plain.predict_proba(X), atol=1e-12)
    np.testing.assert_allclose(ours.score_samples(frame), plain.score_samples(X), rtol=1e-12)
    with pytest.raises(ValueError, match="feature names"):
        ours.predict(frame[NAMES[::-1]])


@pytest.mark.parametrize("kind", FRAMES)
def test_a_search_takes_frames_and_its_best_knows_their_columns(kind):
    ours = MixtureSearch([2, 3, 4, 5], **SEARCH).fit(FRAMES[kind]).set_output(transform=kind)
    assert ours.best_estimator_.feature_names_in_.tolist() == NAMES
    assert type(ours.transform(FRAMES[kind])) is type(FRAMES[kind])


@pytest.mark.parametrize("kind", FRAMES)
def test_a_column_of_text_is_named(kind):
    text = {
        "pandas": FRAMES["pandas"].assign(color="red"),
        "polars": FRAMES["polars"].with_columns(color=polars.lit("red")),
    }
    with pytest.raises(OptionError, match="column 'color' of X must hold numbers: could not convert"):
        GaussianMixture(3).fit(text[kind])


def test_labels_and_weights_may_be_series():
    frame = FRAMES["polars"].with_columns(kind=polars.Series(WHICH), weight=polars.Series(np.arange(200) % 3 + 1))
    ours = GaussianMixture(3, max_iter=3, tol=0.1).fit(
        frame[NAMES], labels=frame["kind"], sample_weight=frame["weight"]
    )
    plain = GaussianMixture(3, max_iter=3, tol=0.1).fit(X, labels=WHICH, sample_weight=np.arange(200) % 3 + 1)
    np.testing.assert_allclose(ours.means_, plain.means_, rtol=1e-12)  # columns lie otherwise in memory


def test_missing_values_of_frames_are_missing():
    holes = FRAMES["polars"].with_columns(width=polars.when(polars.col("length") > 3).then(None).otherwise(X[:, 1]))
    ours = GaussianMixture(2, random_state=0).fit(holes)
    plain = GaussianMixture(2, random_state=0).fit(np.where((np.arange(3) == 1) & (X[:, :1] > 3), np.nan, X))
    np.testing.assert_allclose(ours.means_, plain.means_, rtol=1e-12)


def test_components(fitted, ax):
    assert plot_components(fitted, FRAMES["pandas"], columns=("height", "length"), ax=ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("height", "length")
    assert len(ax.lines) == 6
    part = fitted.marginal([2, 0])
    for k, line in enumerate(ax.lines[3:]):
        away = line.get_xydata() - part.means_[k]
        distance = np.sqrt(np.einsum("pi,pi->p", away, np.linalg.solve(part.covariances_[k], away.T).T))
        np.testing.assert_allclose(distance, 2, rtol=1e-9)
    points, means = ax.collections
    np.testing.assert_allclose(points.get_offsets(), X[:, [2, 0]])
    np.testing.assert_allclose(means.get_offsets(), part.means_)
    colors = np.array([matplotlib.colors.to_rgb(f"C{k}") for k in fitted.predict(FRAMES["pandas"])])
    np.testing.assert_allclose(points.get_facecolors()[:, :3], colors)


def test_rows_of_noise_are_gray(ax):
    noisy = GaussianMixture(2, noise_component=True, random_state=0).fit(X)
    plot_components(noisy, X, ax=ax)
    gray = np.isclose(ax.collections[0].get_facecolors()[:, :3], 0.6).all(1)
    np.testing.assert_array_equal(gray, noisy.predict(X) == -1)


def test_responsibilities(fitted, ax):
    assert plot_responsibilities(fitted, FRAMES["pandas"], ax=ax) is ax
    assert len(ax.collections) == 3
    top = [layer.get_paths()[0].vertices[:, 1].max() for layer in ax.collections]
    assert top[-1] == pytest.approx(1)


def test_criteria(ax):
    search = MixtureSearch([1, 2, 3, 4, 5], **SEARCH).fit(X)
    assert plot_criteria(search, ax=ax) is ax
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["EII", "VVI"]
    drawn = {
        (name, int(k)): score for name, line in zip(names, ax.lines, strict=True) for k, score in line.get_xydata()
    }
    expected = {}
    for one in search.candidates_:
        key = one.covariance, one.n_components
        expected[key] = min(one.score, expected.get(key, np.inf))
    assert drawn == expected
    np.testing.assert_allclose(ax.collections[0].get_offsets()[0], [search.best_.n_components, search.best_.score])
    assert ax.get_ylabel() == "bic"


def test_conditional(fitted, ax):
    assert plot_conditional(fitted, "height", {"length": [0.0, 4.0], 1: [0.0, 5.0]}, ax=ax) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["nothing known", "length = 0, width = 0", "length = 4, width = 5"]
    for line, values in zip(ax.lines, [[0.0, 0], [4, 5]], strict=True):
        grid, density = line.get_xydata().T
        expected = fitted.conditional(np.tile(values, (len(grid), 1)), [0, 1]).score_samples(grid[:, None])
        np.testing.assert_allclose(density, np.exp(expected), rtol=1e-9)
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


def test_wrong_columns_are_refused(fitted, ax):
    with pytest.raises(OptionError, match=r"columns must be of 0 \.\. 2 or length, width, height, got 'depth'"):
        plot_components(fitted, columns=("length", "depth"), ax=ax)
    with pytest.raises(OptionError, match=r"column must be of 0 \.\. 2 or length, width, height, got 3"):
        plot_conditional(fitted, 3, {0: 1}, ax=ax)
    with pytest.raises(OptionError, match="column 'length' is among those given"):
        plot_conditional(fitted, "length", {0: 1}, ax=ax)
    with pytest.raises(OptionError, match="given must have as many values in every column"):
        plot_conditional(fitted, 0, {1: [1, 2], 2: 1}, ax=ax)


def test_axes_are_made_where_none_are_given(fitted, monkeypatch):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    assert plot_components(fitted).figure in map(plt.figure, plt.get_fignums())
    plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(OptionError, match="plots need matplotlib"):
        plot_components(fitted)


def test_matplotlib_torch_and_transformers_are_not_imported():
    heavy = ["matplotlib", "torch", "transformers", "polars"]
    code = f"import sys, mixtura.density.plots; print(*(set({heavy}) & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


@pytest.mark.parametrize("estimator", [GaussianMixture(2), SplitMergeMixture(), MixtureSearch([2])])
def test_columns_of_dates_are_named(estimator):
    days = np.arange("2020-01-01", 200, dtype="datetime64[D]").astype("datetime64[ns]")
    for times in (pandas.Series(days), pandas.Series(days).dt.tz_localize("UTC"), pandas.Series(days - days[0])):
        with pytest.raises(OptionError, match="column 'day' of X must hold numbers, got"):
            clone(estimator).fit(pandas.DataFrame(X, columns=NAMES).assign(day=times))
        with pytest.raises(OptionError, match="column 'day' of X must hold numbers"):
            clone(estimator).fit(pandas.DataFrame({"day": times}))
    periods = pandas.DataFrame(X, columns=NAMES).assign(day=pandas.Series(days).dt.to_period("D"))
    with pytest.raises(OptionError, match="column 'day' of X must hold numbers"):
        GaussianMixture(2).fit(periods)
    for times in (polars.Series(days).dt.date(), polars.Series(days)):
        with pytest.raises(OptionError, match="column 'day' of X must hold numbers, got Date"):
            clone(estimator).fit(polars.DataFrame({"day": times}))
    with pytest.raises(OptionError, match="X must be a table, got a LazyFrame: collect it first"):
        clone(estimator).fit(FRAMES["polars"].lazy())
