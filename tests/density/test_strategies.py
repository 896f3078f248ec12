"""Every way to score rows and to sum their moments against Gaussians written out row by row."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from mixtura.density import GaussianMixture
from mixtura.density._parameters import Parameters, scores_of
from mixtura.density._products import Frame, Products, Shared, Stacked
from mixtura.density._rows import Rows
from mixtura.density._strategies import Factors, choose_strategy

K, D, N = 3, 4, 60
UNITS = {"plain": np.ones(D), "tiny and huge": np.array([1e-60, 1.0, 1e60, 1.0])}


def table(kind, units):
    """Rows, and a mixture of that kind whose second component may have no weight."""
    generator = np.random.default_rng(0)
    means_KD = generator.normal(size=(K, D)) * 2 + 7
    roots = generator.normal(size=(K, D, D)) + 2 * np.eye(D)
    covariances = roots @ roots.swapaxes(1, 2)
    if kind == "shared":
        covariances = np.repeat(covariances[:1], K, 0)
    if kind == "diagonal":
        covariances = np.einsum("kii->ki", covariances) * units**2
    else:
        covariances = covariances * np.outer(units, units)
    X = generator.normal(size=(N, D)) * 2 + 7
    return X * units, Parameters(np.array([0.3, 0.5, 0.2]), means_KD * units, covariances)


def written_out(X, parameters, units):
    """Log scores (K, N), with rows and Gaussians brought back to plain units."""
    covariances = parameters.covariances
    if covariances.ndim == 2:
        covariances = covariances[:, :, None] * np.eye(D)
    plain = covariances / np.outer(units, units)
    log = [
        multivariate_normal(mean / units, covariance).logpdf(X / units)
        for mean, covariance in zip(parameters.means_KD, plain, strict=True)
    ]
    with np.errstate(divide="ignore"):
        return np.array(log) + np.log(parameters.weights_K)[:, None] - np.log(units).sum()


def moments_written_out(X, shares_KN, reference_KD):
    """Counts, first and second moments (K, D, D) about given points, row by row."""
    count_K, first_KD, second = np.zeros(K), np.zeros((K, D)), np.zeros((K, D, D))
    for k in range(K):
        for share, x in zip(shares_KN[k], X, strict=True):
            count_K[k] += share
            first_KD[k] += share * (x - reference_KD[k])
            second[k] += share * np.outer(x - reference_KD[k], x - reference_KD[k])
    return count_K, first_KD, second


def strategy(kind, rows, scores):
    frame = rows.frame
    return {
        "full products": lambda: Products(scores, frame, np.float64),
        "diagonal": lambda: Products(scores, frame, np.float64),
        "stacked": lambda: Stacked(scores, frame, np.float64),
        "shared": lambda: Shared(scores, frame, np.float64, rows.scatter_DD),
        "factors": lambda: Factors(scores, np.float64),
    }[kind]()


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize("empty", [False, True], ids=["all have weight", "one has none"])
@pytest.mark.parametrize("kind", ["full products", "diagonal", "stacked", "shared", "factors"])
def test_scores_and_moments_are_those_written_out(kind, empty, units):
    units = UNITS[units]
    X, parameters = table(kind, units)
    if empty:
        parameters = parameters.with_(weights_K=np.array([0.6, 0.0, 0.4]))
    way = strategy(kind, Rows(X), scores_of(parameters))
    log_KN = written_out(X, parameters, units)
    features = way.features(X)
    scored_KN = way.log_scores(features)
    top_N = log_KN.max(0)
    if kind == "shared":  # up to what components share, which the whole has
        lacking_N = top_N - scored_KN.max(0)
        assert way.common == pytest.approx(lacking_N.sum(), rel=1e-10)
        scored_KN = scored_KN + lacking_N
    np.testing.assert_allclose(scored_KN, log_KN, rtol=1e-10, atol=1e-9)

    shares_KN = np.exp(log_KN - top_N)
    shares_KN /= shares_KN.sum(0)
    count_K, first_KD, second = way.unpack(way.moments(shares_KN, features))
    expected = moments_written_out(X, shares_KN, way.reference_KD)
    np.testing.assert_allclose(count_K, expected[0], rtol=1e-12)
    np.testing.assert_allclose(first_KD / units, expected[1] / units, rtol=1e-9, atol=1e-9)
    other = expected[2].sum(0, keepdims=True) if kind == "shared" else expected[2]
    if kind == "diagonal":
        other = np.einsum("kii->ki", other)
    scale = units**2 if kind == "diagonal" else np.outer(units, units)
    np.testing.assert_allclose(second / scale, other / scale, rtol=1e-9, atol=1e-9)


def test_what_is_chosen():
    """Products of pairs for many components, stacked factors for few or many columns, factors for tiny components."""

    def chosen(K, D, **more):
        generator = np.random.default_rng(0)
        scale = more.pop("scale", 1.0)
        parameters = Parameters(
            np.full(K, 1 / K), generator.normal(size=(K, D)), np.repeat(scale * np.eye(D)[None], K, 0)
        )
        return type(choose_strategy(scores_of(parameters), Frame(np.zeros(D), np.ones(D)), np.float64, "auto", **more))

    assert chosen(16, 8) is Products
    assert chosen(2, 16) is Stacked
    assert chosen(2, 128) is Factors
    assert chosen(2, 16, scale=1e-9) is Factors
    assert chosen(16, 8, scatter_DD=np.eye(8)) is Shared
    assert chosen(2, 16, scale=1e-9, scatter_DD=np.eye(16)) is Factors


def test_the_scatter_of_weighted_rows():
    X, _ = table("full", np.ones(D))
    weights_N = np.arange(1.0, N + 1)
    rows = Rows(X, weights_N, batch_size=7)
    z = X - rows.frame.shift_D
    np.testing.assert_allclose(rows.scatter_DD, sum(w * np.outer(x, x) for w, x in zip(weights_N, z, strict=True)))


def test_a_stream_may_change_its_way():
    """Pooled second moments and those of each component add up."""
    X, _ = table("full", np.ones(D))
    X = np.vstack([X - 5, X + 5])
    streams = {}
    for ways in (("cholesky", "cholesky", "cholesky"), ("auto", "cholesky", "auto"), ("cholesky", "auto", "cholesky")):
        stream = GaussianMixture(2, covariance="tied", random_state=0)
        for way in ways:
            stream.set_params(algorithm=way).partial_fit(X)
        streams[ways] = stream
    first, *others = streams.values()
    for other in others:
        np.testing.assert_allclose(other.covariances_, first.covariances_, rtol=1e-9)
        np.testing.assert_allclose(other.means_, first.means_, rtol=1e-9)
