"""Regression with a joint mixture: least squares for one component, the conditional of a mixture for more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_squared_error

from density.tables import degenerate_tables
from mixtura.core.errors import FileFormatError, MixturaError, OptionError, ShapeError
from mixtura.density import NIW, GaussianMixture, GaussianMixtureRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def bent(n=600, seed=0):
    """Two inputs and two outputs of it, neither linear, with noise."""
    generator = np.random.default_rng(seed)
    X = generator.uniform(-2, 2, size=(n, 2))
    Y = np.c_[np.sin(2 * X[:, 0]) + X[:, 1], 100 * np.abs(X[:, 1])]
    return X, Y + generator.normal(size=(n, 2)) * [0.1, 10]


X, Y = bent()


def by_hand(mixture, x, d):
    """Gates and experts of one row, written out."""
    gates, experts, variances = [], [], []
    for weight, mean, covariance in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True):
        xx, yx, yy = covariance[:d, :d], covariance[d:, :d], covariance[d:, d:]
        gates.append(weight * multivariate_normal(mean[:d], xx).pdf(x))
        experts.append(mean[d:] + yx @ np.linalg.inv(xx) @ (x - mean[:d]))
        variances.append(np.diag(yy - yx @ np.linalg.inv(xx) @ yx.T))
    gates = np.array(gates) / sum(gates)
    mean = gates @ np.array(experts)
    return mean, gates @ (np.array(variances) + (np.array(experts) - mean) ** 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_component_is_least_squares(weighted):
    weights = np.random.default_rng(1).uniform(0.1, 3, len(X)) if weighted else None
    ours = GaussianMixtureRegressor(reg_covar=0).fit(X, Y, sample_weight=weights)
    peer = LinearRegression().fit(X, Y, sample_weight=weights)
    np.testing.assert_allclose(ours.predict(X), peer.predict(X), rtol=1e-9, atol=1e-9)
    _, std = ours.predict(X, return_std=True)
    residual = np.sqrt(np.average((Y - peer.predict(X)) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(std, np.broadcast_to(residual, std.shape), rtol=1e-9)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1e-3, 1), (1, 1e-5), (1e4, 1e-4)])
def test_one_component_is_least_squares_in_any_units(inputs, outputs):
    x, y = inputs * X, outputs * Y
    ours, wanted = GaussianMixtureRegressor().fit(x, y), LinearRegression().fit(x, y).predict(x)
    np.testing.assert_allclose(ours.predict(x), wanted, atol=1e-5 * y.std())
    flat = np.c_[x, np.ones(len(x))]
    np.testing.assert_allclose(GaussianMixtureRegressor().fit(flat, y).predict(flat), wanted, atol=1e-5 * y.std())


@pytest.mark.parametrize("family", ["VVV", "EEE", "VVI"])
def test_more_components_are_gates_and_experts(family):
    ours = GaussianMixtureRegressor(4, covariance=family, random_state=0).fit(X, Y)
    means, deviations = ours.predict(X[:20], return_std=True)
    for x, mean, deviation in zip(X[:20], means, deviations, strict=True):
        expected, variance = by_hand(ours.mixture_, x, 2)
        np.testing.assert_allclose(mean, expected, rtol=1e-9)
        np.testing.assert_allclose(deviation**2, variance, rtol=1e-8)


def test_the_whole_conditional_is_a_density_with_that_mean():
    ours = GaussianMixtureRegressor(3, random_state=0).fit(X, Y[:, 0])
    batch = ours.predict_dist(X[:4])
    mean, std = ours.predict(X[:4], return_std=True)
    np.testing.assert_allclose(batch.mean()[:, 0], mean, rtol=1e-12)
    np.testing.assert_allclose(batch.covariance()[:, 0, 0], std**2, rtol=1e-10)
    for row in range(4):
        one = ours.predict_dist(X[row : row + 1])
        density = lambda value, one=one: float(np.exp(one.score_samples([[value]])[0]))
        assert quad(density, -20, 20, points=[float(mean[row])], limit=200)[0] == pytest.approx(1, abs=1e-6)
    draws = np.concatenate([batch.sample(seed) for seed in range(3000)], axis=1)
    np.testing.assert_allclose(draws.mean(1), mean, atol=5 * std.max() / np.sqrt(3000))


def test_mean_and_variance_add_up_over_rows_of_the_mixture_itself():
    """Laws of total expectation and variance; over training rows they hold for one component, else nearly."""
    ours = GaussianMixtureRegressor(5, random_state=0).fit(X, Y)
    rows, _ = ours.mixture_.set_params(random_state=1).sample(200_000)
    means, std = ours.predict(rows[:, :2], return_std=True)
    np.testing.assert_allclose((means.mean(0) - rows[:, 2:].mean(0)) / rows[:, 2:].std(0), 0, atol=0.01)
    np.testing.assert_allclose(means.var(0) + (std**2).mean(0), rows[:, 2:].var(0), rtol=0.01)
    assert (means.var(0) < rows[:, 2:].var(0)).all()
    one = GaussianMixtureRegressor(reg_covar=0).fit(X, Y)
    np.testing.assert_allclose(one.predict(X).mean(0), Y.mean(0), rtol=1e-9)


@pytest.mark.parametrize("k", [1, 8])
def test_corrected_predictions_vary_as_outputs_do(k):
    weights = np.random.default_rng(1).integers(1, 4, len(X))
    heavy, outputs = np.repeat(X, weights, 0), np.repeat(Y, weights, 0)
    ours = GaussianMixtureRegressor(k, random_state=0).fit(X, Y, sample_weight=weights)
    raw, std = ours.predict(heavy, return_std=True)
    corrected, same_std = ours.set_params(variance="global-corrected").predict(heavy, return_std=True)
    np.testing.assert_allclose(corrected.var(0), outputs.var(0), rtol=1e-9)
    np.testing.assert_allclose(corrected.mean(0), outputs.mean(0), rtol=1e-9)
    np.testing.assert_allclose(np.ptp((corrected - outputs.mean(0)) / (raw - raw.mean(0)), axis=0), 0, atol=1e-9)
    assert np.array_equal(std, same_std)
    if k == 1:  # least squares: smooth, and nearest
        assert (raw.var(0) < 0.9 * outputs.var(0)).all()
        assert mean_squared_error(outputs, raw) < mean_squared_error(outputs, corrected)


def test_bends_are_followed():
    test_X, test_Y = bent(seed=1)
    scores = [GaussianMixtureRegressor(k, random_state=0).fit(X, Y).score(test_X, test_Y) for k in (1, 12)]
    assert scores[0] < 0.4
    assert scores[1] > 0.9


def test_whole_weights_are_repeated_rows():
    weights = np.random.default_rng(3).integers(0, 4, len(X))
    options = {"max_iter": 20, "tol": 0, "random_state": 0}
    weighted = GaussianMixtureRegressor(3, **options).fit(X, Y, sample_weight=weights)
    repeated = GaussianMixtureRegressor(3, **options).fit(np.repeat(X, weights, 0), np.repeat(Y, weights, 0))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-7)
    np.testing.assert_allclose(weighted._regression.gain_R, repeated._regression.gain_R, rtol=1e-7)


def test_missing_inputs_are_left_out_of_the_condition():
    ours = GaussianMixtureRegressor(3, random_state=0).fit(X, Y)
    holes = X.copy()
    holes[::2, 0] = np.nan
    holes[3] = np.nan
    means, std = ours.predict(holes, return_std=True)
    smaller = ours.mixture_.marginal([1, 2, 3]).conditional(holes[::2, 1:], [0])
    np.testing.assert_allclose(means[::2], smaller.mean(), rtol=1e-9)
    np.testing.assert_allclose(std[::2] ** 2, np.diagonal(smaller.covariance(), 0, 1, 2), rtol=1e-9)
    np.testing.assert_allclose(means[1], ours.predict(X[1:2])[0], rtol=1e-9)
    np.testing.assert_allclose(means[3], ours.mixture_.weights_ @ ours.mixture_.means_[:, 2:], rtol=1e-9)
    taught = GaussianMixtureRegressor(3, reg_covar=1e-6, random_state=0).fit(holes, Y)
    joint = GaussianMixture(3, init="whitened-kmeans", random_state=0).fit(np.hstack([holes, Y]))
    np.testing.assert_allclose(taught.mixture_.means_, joint.means_, rtol=1e-12)


def test_chunks_do_not_change_predictions(monkeypatch):
    ours = GaussianMixtureRegressor(3, random_state=0).fit(X, Y)
    whole = ours.predict(X, return_std=True)
    monkeypatch.setattr("mixtura.density.gaussian_mixture_regressor.CHUNK", 50)
    for one, other in zip(whole, ours.predict(X, return_std=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_outputs_keep_their_shape():
    for y, shape in ((Y, (5, 2)), (Y[:, :1], (5, 1)), (Y[:, 0], (5,))):
        ours = GaussianMixtureRegressor(2, random_state=0).fit(X, y)
        assert [one.shape for one in ours.predict(X[:5], return_std=True)] == [shape, shape]
        assert ours.predict(X[:5]).shape == shape


@pytest.mark.parametrize("options", [{}, {"covariance": "diag", "variance": "global-corrected"}, {"prior": NIW(nu=9)}])
def test_what_is_saved_loads_back(tmp_path, options):
    import pandas as pd

    frame = pd.DataFrame(X, columns=["a", "b"])
    ours = GaussianMixtureRegressor(3, random_state=0, **options).fit(frame, Y[:, 0])
    ours.save(tmp_path / "regressor.safetensors")
    again = GaussianMixtureRegressor.load(tmp_path / "regressor.safetensors")
    for one, other in zip(ours.predict(frame, return_std=True), again.predict(frame, return_std=True), strict=True):
        assert np.array_equal(one, other)
    assert again.feature_names_in_.tolist() == ["a", "b"]
    assert again.n_features_in_ == 2
    assert again.get_params().keys() == ours.get_params().keys()
    assert again.converged_ == ours.converged_
    with pytest.raises(FileFormatError, match="holds no GaussianMixture of format"):
        GaussianMixture.load(tmp_path / "regressor.safetensors")


def test_files_of_other_options_are_refused(tmp_path, monkeypatch):
    ours = GaussianMixtureRegressor(3, random_state=0).fit(X, Y).set_params(n_components=2)
    monkeypatch.setattr(ours, "_check_state", lambda: None)  # save would refuse too
    ours.save(tmp_path / "regressor.safetensors")
    with pytest.raises(FileFormatError, match="n_components=2 does not go with 3 components"):
        GaussianMixtureRegressor.load(tmp_path / "regressor.safetensors")


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(OptionError, match="variance must be one of raw, global-corrected, got 'smooth'"):
        GaussianMixtureRegressor(variance="smooth").fit(X, Y)
    with pytest.raises(ShapeError, match=r"y must be \(600,\) or \(600, R\)"):
        GaussianMixtureRegressor().fit(X, Y[:-1])
    with pytest.raises(ValueError, match="Input y contains NaN"):
        GaussianMixtureRegressor().fit(X, np.where(Y > 0, Y, np.nan))
    with pytest.raises(OptionError, match="X must be finite for predict_dist"):
        GaussianMixtureRegressor().fit(X, Y).predict_dist([[np.nan, 0]])
    constant = GaussianMixtureRegressor(covariance="diag", variance="global-corrected").fit(X, Y)
    with pytest.raises(OptionError, match="cannot scale output 0: its predictions are the same for all rows"):
        constant.predict(X)
    assert issubclass(OptionError, MixturaError)


@pytest.mark.filterwarnings("ignore::mixtura.core.errors.MixturaWarning")
@given(degenerate_tables(), st.integers(1, 4), st.sampled_from(["VVV", "EEE", "VVI"]), st.sampled_from([0.0, 1e-6]))
def test_degenerate_data_fit_or_are_refused_by_name(table, k, family, reg_covar):
    inputs, outputs = np.c_[table, np.arange(len(table))], np.nan_to_num(table[:, :1])
    ours = GaussianMixtureRegressor(k, covariance=family, reg_covar=reg_covar, random_state=0, max_iter=10)
    try:
        ours.fit(inputs, outputs)
    except MixturaError as error:
        assert len(str(error)) > 20  # noqa: PT017
        return
    mean, std = ours.predict(inputs, return_std=True)
    assert np.isfinite(mean).all()
    assert (std >= 0).all()


def test_torch_tensors_come_in():
    import torch

    ours = GaussianMixtureRegressor(2, random_state=0).fit(torch.tensor(X), torch.tensor(Y))
    assert np.array_equal(ours.predict(torch.tensor(X)), ours.predict(X))
