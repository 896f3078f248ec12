"""In and out: files, scikit-learn's mixtures, copies and pickles of scikit-learn's own ways."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.mixture import GaussianMixture as SklearnMixture

from density.tables import responsibilities, rows, same
from mixtura.core.errors import FileFormatError, OptionError
from mixtura.density import (
    FAMILIES,
    NIW,
    BayesianGaussianMixture,
    GaussianMixture,
    GaussianMixtureRegressor,
    TiedWeights,
)
from mixtura.density.families import ALIASES


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_back_to_the_bit(family, tmp_path):
    X, _ = rows()
    ours = GaussianMixture(3, covariance=family, random_state=0, tol=1e-4).fit(X)
    ours.save(tmp_path / "mixture.safetensors")
    other = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert other.get_params() == ours.get_params()
    for name in ("weights_", "means_", "covariances_"):
        assert np.array_equal(getattr(other, name), getattr(ours, name))
    assert np.array_equal(other.predict_proba(X), ours.predict_proba(X))
    assert other.bic(X) == ours.bic(X)


def test_options_columns_noise_and_priors_are_kept(tmp_path):
    import pandas

    frame = pandas.DataFrame(rows()[0], columns=["a", "b", "c"])
    prior = NIW(nu=9, psi=np.eye(3), mean=[0.0, 0, 0])
    ours = GaussianMixture(3, noise_component=True, prior=prior, init=responsibilities()).fit(frame)
    ours.save(tmp_path / "mixture.safetensors")
    other = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert other.feature_names_in_.tolist() == ["a", "b", "c"]
    assert np.array_equal(other.predict_proba(frame), ours.predict_proba(frame))
    assert np.array_equal(other.init, ours.init)
    same(other.fit(frame), ours)


@pytest.mark.parametrize("kind", sorted(ALIASES))
def test_to_scikit_learn_and_back(kind):
    X, _ = rows()
    theirs = SklearnMixture(3, covariance_type=kind, random_state=0).fit(X)
    ours = GaussianMixture.from_sklearn(theirs)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-9)
    back = ours.to_sklearn()
    assert back.covariance_type == kind
    np.testing.assert_allclose(back.predict_proba(X), theirs.predict_proba(X), atol=1e-9)
    np.testing.assert_allclose(back.precisions_, theirs.precisions_, rtol=1e-7, atol=1e-9)
    assert ours.bic(X) == pytest.approx(theirs.bic(X))


def test_families_that_scikit_learn_lacks_become_full():
    X, _ = rows()
    ours = GaussianMixture(3, covariance="VEV", random_state=0).fit(X)
    theirs = ours.to_sklearn()
    assert theirs.covariance_type == "full"
    np.testing.assert_allclose(theirs.score_samples(X), ours.score_samples(X), rtol=1e-9)


def test_clones_and_pickles_as_scikit_learn_has_them():
    X, _ = rows()
    ours = GaussianMixture(3, covariance="VEV", random_state=0).fit(X)
    assert np.array_equal(pickle.loads(pickle.dumps(ours)).predict_proba(X), ours.predict_proba(X))
    assert np.array_equal(clone(ours).fit(X).means_, ours.means_)


def test_a_stream_goes_on_after_loading_as_if_nothing_had_happened(tmp_path):
    X, _ = rows()
    ours = GaussianMixture(3, random_state=0, prior=NIW()).partial_fit(X[:100]).partial_fit(X[100:150])
    ours.save(tmp_path / "mixture.safetensors")
    other = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert other.n_batches_seen_ == 2
    same(other.partial_fit(X[150:]), ours.partial_fit(X[150:]), rtol=0)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "mixture.safetensors"
    ours = GaussianMixture(2, random_state=0).fit(rows()[0])
    ours.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        GaussianMixture.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match="holds no GaussianMixture of format"):
        GaussianMixture.load(path)
    about = {
        "format": "mixtura.density/1",
        "class": "GaussianMixture",
        "notes": "{}",
        "columns": "[]",
        "stream": "null",
    }
    for options in ("[", json.dumps({"covariance": "XXX"}), json.dumps({"covariance": "VVV", "colour": 3})):
        save_file(
            tensors, path, metadata={**about, "options": options, "notes": "{}", "columns": "[]", "stream": "null"}
        )
        with pytest.raises(FileFormatError, match="is damaged"):
            GaussianMixture.load(path)


def test_what_cannot_be_kept_is_refused_and_nothing_is_written(tmp_path):
    X, _ = rows()
    tied = GaussianMixture(2, constraints=TiedWeights(), random_state=0).fit(X)
    with pytest.raises(OptionError, match="constraints are not kept in files"):
        tied.save(tmp_path / "mixture.safetensors")
    drawn = GaussianMixture(2, random_state=np.random.RandomState(0)).fit(X)
    with pytest.raises(OptionError, match="an option cannot be kept in a file: RandomState"):
        drawn.save(tmp_path / "mixture.safetensors")
    assert not list(tmp_path.iterdir())


def test_covariances_must_be_symmetric():
    with pytest.raises(OptionError, match="covariances must be symmetric"):
        GaussianMixture.from_parameters([1], [[0, 0]], [[[1, 0.9], [0, 1]]])


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        (GaussianMixture, {"n_components": 3}),
        (GaussianMixture, {"covariance": "VVI"}),
        (BayesianGaussianMixture, {"covariance": "VVI"}),
        (BayesianGaussianMixture, {"weights": "dirichlet"}),
        (GaussianMixtureRegressor, {"n_components": 3}),
        (GaussianMixtureRegressor, {"covariance": "VVI"}),
    ],
)
def test_options_changed_after_the_fit_are_not_written(estimator, changes, tmp_path):
    X, _ = rows()
    ours = estimator(2, random_state=0).fit(X, X[:, 0] ** 2)
    ours.set_params(**changes)
    with pytest.raises(OptionError, match="what is fitted is not what the options say; fit again before save"):
        ours.save(tmp_path / "mixture.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_iterations_told_is_kept(tmp_path):
    ours = GaussianMixture(2, reg_covar=[1e-6, 1e-5, 1e-4], random_state=0).fit(rows()[0])
    ours.save(tmp_path / "mixture.safetensors")
    loaded = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert loaded.lower_bounds_ == ours.lower_bounds_
    assert loaded.reg_covar == ours.reg_covar
