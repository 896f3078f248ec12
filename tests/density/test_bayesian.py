"""Variational Bayes: parity with scikit-learn for full covariances, and a bound that is one, for every family."""

from itertools import product

import numpy as np
import pytest
from scipy.special import gammaln, multigammaln
from scipy.stats import multivariate_t
from sklearn.mixture import BayesianGaussianMixture as SklearnBayesian

from density.tables import responsibilities, rows, with_holes
from mixtura.core.errors import OptionError
from mixtura.density import NIW, BayesianGaussianMixture, GaussianMixture, SingularComponentError
from mixtura.density._variational import CONJUGATE

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
KINDS = {"process": "dirichlet_process", "dirichlet": "dirichlet_distribution"}
every_family = pytest.mark.parametrize("family", CONJUGATE)
both_weights = pytest.mark.parametrize("weights", KINDS)


class FromResponsibilities(SklearnBayesian):
    """scikit-learn's, from given responsibilities."""

    def _initialize_parameters(self, X, random_state, **_):
        self._initialize(X, responsibilities())


def fit(X, K=3, **options):
    options = {"tol": 0, "max_iter": 40, "reg_covar": 0, "init": responsibilities(len(X), K), **options}
    return BayesianGaussianMixture(K, **options).fit(X)


@both_weights
@pytest.mark.parametrize("columns", [3, 1])
def test_ten_iterations_are_those_of_scikit_learn(weights, columns):
    X = rows()[0][:, :columns]
    kind = KINDS[weights]
    options = {"weight_concentration_prior_type": kind, "tol": 0, "max_iter": 10, "reg_covar": 1e-6}
    theirs = FromResponsibilities(n_components=3, covariance_type="full", **options).fit(X)
    ours = fit(X, weights=weights, max_iter=10, reg_covar=1e-6)
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-8, atol=1e-12)


@both_weights
def test_the_bound_is_that_of_scikit_learn_up_to_its_constant(weights):
    """Theirs is of half a step: of the posterior of the next, and the responsibilities of this one."""
    X, _ = rows()
    options = {"tol": 0, "max_iter": 400, "reg_covar": 0}
    theirs = FromResponsibilities(n_components=3, weight_concentration_prior_type=KINDS[weights], **options).fit(X)
    ours = np.array(fit(X, weights=weights, max_iter=400).lower_bounds_) * 200
    halves = np.array(theirs.lower_bounds_)
    constant = ours[-1] - halves[-1]
    steps = min(len(halves), 20)
    assert (halves[:steps] + constant >= ours[:steps] - 1e-6).all()
    assert (halves[:steps] + constant <= ours[1 : steps + 1] + 1e-6).all()


@both_weights
@every_family
def test_the_bound_never_falls(family, weights):
    X, _ = rows()
    assert np.diff(fit(X, covariance=family, weights=weights).lower_bounds_).min() > -1e-10
    assert np.diff(fit(with_holes(X), covariance=family, weights=weights).lower_bounds_).min() > -1e-10
    noisy = BayesianGaussianMixture(3, covariance=family, weights=weights, tol=0, max_iter=40, reg_covar=0)
    assert np.diff(noisy.fit(X, noise_cov=np.full(X.shape, 0.5)).lower_bounds_).min() > -1e-10


def log_marginal(X, prior, m=1):
    """Log evidence of rows of one Gaussian under a normal-Wishart prior, or m columns that share a Gamma one."""
    N, D = X.shape
    if N == 0:
        return 0.0
    kappa, mean = prior.kappa + N, X.mean(0)
    away = np.outer(mean - prior.mean, mean - prior.mean) * prior.kappa * N / kappa
    scale = prior.psi + (X - mean).T @ (X - mean) + away
    ratio = 0.5 * D * np.log(prior.kappa / kappa)
    if m:  # Gamma
        start, end = 0.5 * m * prior.nu, 0.5 * m * (prior.nu + N)
        shared = [(np.trace(prior.psi), np.trace(scale))]
        pairs = shared if m == D > 1 else zip(np.diag(prior.psi), np.diag(scale), strict=True)
        own = sum(
            gammaln(end) - gammaln(start) + start * np.log(0.5 * before) - end * np.log(0.5 * after)
            for before, after in pairs
        )
        return own + ratio - 0.5 * N * D * np.log(2 * np.pi)
    dets = 0.5 * prior.nu * np.linalg.slogdet(prior.psi)[1] - 0.5 * (prior.nu + N) * np.linalg.slogdet(scale)[1]
    return (
        dets + ratio + multigammaln(0.5 * (prior.nu + N), D) - multigammaln(0.5 * prior.nu, D)
        - 0.5 * N * D * np.log(np.pi)
    )  # fmt: skip


PRIOR = NIW(kappa=0.7, nu=6.0, psi=np.diag([1.0, 2.0, 3.0]) + 0.3, mean=np.array([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(("family", "m"), [("VVV", 0), ("EEE", 0), ("VVI", 1), ("EEI", 1), ("VII", 3), ("EII", 3)])
def test_of_one_component_the_bound_is_the_evidence(family, m):
    X, _ = rows(30)
    ours = fit(X, 1, covariance=family, prior=PRIOR, weights="dirichlet", max_iter=2)
    assert ours.lower_bound_ * 30 == pytest.approx(log_marginal(X, PRIOR, m), rel=1e-10)


@both_weights
def test_the_bound_lies_between_the_clear_assignment_and_the_evidence(weights):
    generator = np.random.default_rng(0)
    X = generator.normal(size=(8, 3)) + 30 * (np.arange(8) % 2)[:, None]
    ours = fit(X, 2, prior=PRIOR, weights=weights, weight_concentration=0.5, max_iter=100, init=np.arange(8) % 2)
    logs = {}
    for assignment in product([0, 1], repeat=8):
        counts = np.bincount(assignment, minlength=2)
        if weights == "dirichlet":
            prior = gammaln(counts + 0.5).sum() - 2 * gammaln(0.5) + gammaln(1) - gammaln(9)
        else:  # sticks: Beta(1, 0.5) of each, with the rest unused
            after = [counts[1], 0]
            prior = sum(
                gammaln(1 + n) + gammaln(0.5 + r) - gammaln(1.5 + n + r) + gammaln(1.5) - gammaln(1) - gammaln(0.5)
                for n, r in zip(counts, after, strict=True)
            )
        where = np.array(assignment)
        parts = [log_marginal(X[where == k], PRIOR, 0) for k in (0, 1)]
        logs[assignment] = prior + sum(parts)
    evidence, clear = np.logaddexp.reduce(list(logs.values())), logs[tuple(np.arange(8) % 2)]
    assert clear < ours.lower_bound_ * 8 < evidence < clear + 1.5


def test_of_one_row_everything_is_known():
    """The predictive density of one Gaussian is a Student t; its location and scale are those kept."""
    X, _ = rows(50)
    ours = fit(X, 1, prior=PRIOR)
    posterior = ours.posterior_
    free = posterior.dof_K[0] - 2
    shape = posterior.scale[0] * (1 + 1 / posterior.kappa_K[0]) / free
    expected = multivariate_t(posterior.means_KD[0], shape, df=free).logpdf(X[:1])
    assert log_marginal(np.vstack([X, X[:1]]), PRIOR, 0) - log_marginal(X, PRIOR, 0) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
@both_weights
def test_components_that_are_not_needed_stay_empty(weights, seed):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(600, 2)) + 8 * np.eye(3)[generator.integers(0, 3, 600)][:, :2]
    ours = BayesianGaussianMixture(8, weights=weights, weight_concentration=1e-3, max_iter=2000, tol=1e-7)
    ours.set_params(random_state=seed, covariance="VII").fit(X)
    assert (ours.weights_ > 0.01).sum() == 3
    assert len(np.unique(ours.predict(X))) == 3


def test_labels_weights_and_streams_are_those_of_the_engine():
    X, which = rows()
    weights = np.random.default_rng(3).integers(0, 3, len(X))
    options = {"tol": 0, "max_iter": 15, "random_state": 0, "reg_covar": 0}
    heavy = BayesianGaussianMixture(3, prior=PRIOR, **options).fit(X, sample_weight=weights)
    many = BayesianGaussianMixture(3, prior=PRIOR, **options).fit(np.repeat(X, weights, 0))
    np.testing.assert_allclose(heavy.means_, many.means_, rtol=1e-9)
    assert heavy.lower_bound_ == pytest.approx(many.lower_bound_, rel=1e-9)
    named = BayesianGaussianMixture(3, prior=NIW(kappa=1e-8), **options).fit(X, labels=which)
    np.testing.assert_allclose(named.means_, [X[which == k].mean(0) for k in range(3)], rtol=1e-6)
    one = BayesianGaussianMixture(3, random_state=0, max_iter=1, reg_covar=0).fit(X)
    batch = BayesianGaussianMixture(3, random_state=0, reg_covar=0).partial_fit(X)
    np.testing.assert_allclose(batch.means_, one.means_, rtol=1e-10)
    stream = BayesianGaussianMixture(3, random_state=0, prior=PRIOR)
    X, _ = rows(20_000, seed=5)
    for part in np.array_split(X, 40):
        stream.partial_fit(part)
    whole = BayesianGaussianMixture(3, random_state=0, prior=PRIOR, tol=1e-8).fit(X)
    assert whole.score(X) - stream.score(X) < 0.01
    np.testing.assert_allclose(stream.posterior_.kappa_K.sum(), 20_000 + 3 * 0.7)


@every_family
def test_densities_samples_marginals_and_conditionals_agree(family):
    X, _ = rows()
    ours = BayesianGaussianMixture(3, covariance=family, random_state=0).fit(X)
    plain = GaussianMixture.from_parameters(ours.weights_, ours.means_, ours.covariances_)
    np.testing.assert_allclose(ours.score_samples(X), plain.score_samples(X), rtol=1e-9)
    joint = ours.marginal([1]).score_samples(X[:, [1]]) + ours.conditional(X[:, [1]], [1]).score_samples(X[:, [0, 2]])
    np.testing.assert_allclose(ours.score_samples(X), joint, rtol=1e-9)
    assert ours.sample(5)[0].shape == (5, 3)
    assert ours.weights_.sum() == pytest.approx(1)


@both_weights
def test_files_and_going_on(weights, tmp_path):
    X, _ = rows()
    ours = BayesianGaussianMixture(3, weights=weights, random_state=0, prior=PRIOR).fit(X)
    ours.save(tmp_path / "mixture.safetensors")
    other = BayesianGaussianMixture.load(tmp_path / "mixture.safetensors")
    assert np.array_equal(other.predict_proba(X), ours.predict_proba(X))
    assert np.array_equal(other.partial_fit(X[:50]).means_, ours.partial_fit(X[:50]).means_)
    begun = fit(X, max_iter=4)
    np.testing.assert_allclose(begun.set_params(warm_start=True).fit(X).means_, fit(X, max_iter=8).means_, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:reg_covar")
def test_degenerate_data_are_fitted_or_refused():
    X, _ = rows()
    flat = np.c_[X, np.ones(len(X))]
    for table in (flat, np.ones((5, 2)), X[:1], X * 1e-12, X + 1e8):
        ours = BayesianGaussianMixture(1, random_state=0).fit(table)
        assert np.isfinite(ours.lower_bound_)
        assert np.isfinite(ours.score_samples(table)).all()
    with pytest.raises(SingularComponentError):
        BayesianGaussianMixture(1, reg_covar=0).fit(np.c_[X, X[:, 0]])
    wrong = [
        ({"covariance": "VEV"}, "covariance needs a conjugate prior: EII, VII, EEI, VVI, EEE, VVV, got 'VEV'"),
        ({"weights": "stick"}, "weights must be one of process, dirichlet, got 'stick'"),
        ({"weight_concentration": 0}, "weight_concentration must be a number"),
        ({"prior": NIW(kappa=0)}, "prior needs kappa > 0 here, got 0"),
    ]
    for options, text in wrong:
        with pytest.raises(OptionError, match=text):
            BayesianGaussianMixture(2, **options).fit(X)
