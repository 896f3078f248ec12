"""Constraints hold after every fit; those that are exact never let the likelihood fall, and are its maximum."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from density.tables import responsibilities, rows, same
from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import (
    FAMILIES,
    NIW,
    CannotLink,
    FixedMeans,
    GaussianMixture,
    MaxConditionNumber,
    MinWeight,
    MustLink,
    SharedCovariance,
    TiedWeights,
)
from mixtura.density.constraints import clip_eigenvalues
from mixtura.density.families import find_family

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
VALUES = np.array([[0.0, 0, 0], [4, 4, 4], [8, 8, 8]])
WHOLE = FixedMeans([True, False, False], VALUES)
SOME = FixedMeans([[True, False, False], [False, True, True], [False, False, False]], VALUES)
CONSTRAINTS = {
    "TiedWeights": TiedWeights(),
    "MinWeight": MinWeight(0.3),
    "FixedMeans whole": WHOLE,
    "FixedMeans some": SOME,
    "MaxConditionNumber": MaxConditionNumber(1.5),
    "SharedCovariance": SharedCovariance(["a", "b", "a"]),
}


def fit(constraints, family="VVV", **options):
    X, _ = rows()
    options = {"init": responsibilities(), "reg_covar": 0, "tol": 0, "max_iter": 40, **options}
    return GaussianMixture(3, covariance=family, constraints=constraints, **options).fit(X)


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_never_falls_under_exact_constraints(name, family):
    constraint = CONSTRAINTS[name]
    ours = fit(constraint, family)
    assert np.isfinite(ours.lower_bounds_).all()
    if constraint.exact(find_family(family)):
        assert np.diff(ours.lower_bounds_).min() > -1e-9


def test_constraints_hold():
    np.testing.assert_allclose(fit(TiedWeights()).weights_, 1 / 3)
    least = fit(MinWeight(0.3)).weights_
    assert least.min() == pytest.approx(0.3)
    assert least.sum() == pytest.approx(1)
    np.testing.assert_array_equal(fit(WHOLE).means_[0], VALUES[0])
    mask = np.array(SOME.mask)
    np.testing.assert_array_equal(fit(SOME).means_[mask], VALUES[mask])
    values = np.linalg.eigvalsh(fit(MaxConditionNumber(1.5)).covariances_)
    assert (values[:, -1] / values[:, 0]).max() == pytest.approx(1.5)
    shared = fit(CONSTRAINTS["SharedCovariance"]).covariances_
    np.testing.assert_array_equal(shared[0], shared[2])
    assert not np.allclose(shared[0], shared[1])


def test_several_constraints_hold_together():
    ours = fit([TiedWeights(), WHOLE, SharedCovariance([0, 0, 1]), MaxConditionNumber(2)])
    np.testing.assert_allclose(ours.weights_, 1 / 3)
    np.testing.assert_array_equal(ours.means_[0], VALUES[0])
    np.testing.assert_array_equal(ours.covariances_[0], ours.covariances_[1])
    assert np.linalg.cond(ours.covariances_).max() < 2 + 1e-9


def test_all_in_one_group_is_the_family_of_equal_covariances():
    same(fit(SharedCovariance([0, 0, 0])), fit(None, "EEE"), rtol=1e-9)


def test_parameters_that_are_not_free_are_not_counted():
    free = fit(None).n_parameters_
    for name, removed in [("TiedWeights", 2), ("MinWeight", 0), ("FixedMeans whole", 3), ("SharedCovariance", 6)]:
        assert fit(CONSTRAINTS[name]).n_parameters_ == free - removed, name


@pytest.mark.parametrize("limit", [1.0, 1.7, 3.0])
def test_clipped_eigenvalues_are_the_most_likely(limit):
    values = np.random.default_rng(0).uniform(0.1, 5, 6)
    ours = clip_eigenvalues(values, limit)

    def deviance(clipped):
        return (np.log(clipped) + values / clipped).sum()

    floors = np.linspace(0.05, 6, 4000)
    best = min(deviance(np.clip(values, floor, limit * floor)) for floor in floors)
    assert deviance(ours) <= best + 1e-9
    assert ours.max() / ours.min() <= limit * (1 + 1e-12)


def test_fixed_columns_move_the_others_to_the_maximum():
    X, _ = rows(60)
    ours = GaussianMixture(1, constraints=FixedMeans([[True, False, False]], [[3.0, 0, 0]]), reg_covar=0).fit(X)

    def deviance(free):
        centered = X - np.array([3.0, *free])
        return np.linalg.slogdet(centered.T @ centered)[1]

    np.testing.assert_allclose(ours.means_[0, 1:], minimize(deviance, X.mean(0)[1:]).x, atol=1e-4)


def slow_links(X, ours, must, cannot):
    """Log likelihood and responsibilities by all assignments of few rows."""
    density = np.stack([multivariate_normal.pdf(X, m, c) for m, c in zip(ours.means_, ours.covariances_, strict=True)])
    groups = list(range(len(X)))
    for i, j in must:
        groups = [groups[i] if group == groups[j] else group for group in groups]
    allowed, total = np.zeros((3, len(X))), 0.0
    prior = 0.0
    for assignment in product(range(3), repeat=len(X)):
        if any(assignment[i] != assignment[groups[i]] for i in range(len(X))):
            continue
        if any(assignment[i] == assignment[j] for i, j in cannot):
            continue
        weight = np.prod([ours.weights_[assignment[g]] for g in set(groups)])
        prior += weight
        chance = weight * np.prod([density[k, i] for i, k in enumerate(assignment)])
        total += chance
        allowed[list(assignment), range(len(X))] += chance
    return np.log(total / prior), allowed / total


@pytest.mark.parametrize(
    ("must", "cannot"), [([(0, 1), (1, 4)], []), ([], [(0, 3), (1, 2)]), ([(0, 1)], [(1, 5)])], ids=str
)
@pytest.mark.filterwarnings("ignore:reg_covar")
def test_links_are_what_all_assignments_say(must, cannot):
    X, _ = rows(6)
    links = [MustLink(must)] if must else []
    links += [CannotLink(cannot)] if cannot else []
    start = GaussianMixture(3, init=responsibilities(6), max_iter=0, reg_covar=1.0).fit(X)
    expected, shares = slow_links(X, start, must, cannot)
    one = GaussianMixture(3, init=responsibilities(6), max_iter=1, reg_covar=1.0, constraints=links).fit(X)
    assert one.lower_bound_ * 6 == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(one.means_, shares @ X / shares.sum(1, keepdims=True), rtol=1e-9)


def test_links_decide_where_the_data_do_not():
    generator = np.random.default_rng(0)
    X = np.vstack([generator.normal(size=(60, 2)), generator.normal(size=(60, 2)) + np.array([2.5, 0])])
    which = np.repeat([0, 1], 60)
    pairs = [(i, i + 1) for i in range(119) if i != 59]
    linked = GaussianMixture(2, constraints=MustLink(pairs), random_state=0).fit(X)
    assert linked.means_[:, 0].max() - linked.means_[:, 0].min() > 2
    apart = [(i, i + 60) for i in range(60)]
    separate = GaussianMixture(2, constraints=CannotLink(apart), random_state=0).fit(X)
    found = separate.predict(X)
    assert max((found == which).mean(), (found != which).mean()) > 0.85


def test_a_prior_holds_what_would_collapse():
    X = np.repeat(rows(5)[0], 4, axis=0)
    ours = GaussianMixture(4, prior=NIW(), reg_covar=0, random_state=0).fit(X)
    assert np.linalg.eigvalsh(ours.covariances_).min() > 1e-3
    assert np.diff(ours.lower_bounds_).min() > -1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_posterior_density_never_falls(family):
    prior = NIW(kappa=0.5, nu=8, psi=2.0, mean=[1, 2, 3])
    ours = fit(None, family, prior=prior, weight_concentration=3.0)
    assert np.diff(ours.lower_bounds_).min() > -1e-9


def test_a_heavy_prior_is_the_answer():
    ours = fit(None, prior=NIW(kappa=1e9, nu=1e9, psi=2e9, mean=[1, 2, 3]), weight_concentration=1e9)
    np.testing.assert_allclose(ours.means_, np.tile([1, 2, 3], (3, 1)), atol=1e-5)
    np.testing.assert_allclose(ours.covariances_, 2 * np.tile(np.eye(3), (3, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(ours.weights_, 1 / 3, atol=1e-5)


def test_wrong_constraints_are_refused():
    X, _ = rows()
    wrong = [
        ("lower", OptionError, "constraints must hold objects"),
        (MinWeight(0.5), OptionError, "MinWeight needs a minimum between 0 and 1/3"),
        (FixedMeans([True], VALUES), ShapeError, r"FixedMeans needs mask and values of shape \(3, 3\)"),
        (FixedMeans([True] * 3, VALUES + np.nan), OptionError, "FixedMeans needs finite values"),
        (SharedCovariance([0, 1]), ShapeError, "SharedCovariance needs 3 groups"),
        (MaxConditionNumber(0.5), OptionError, "MaxConditionNumber needs a limit of at least 1"),
        (MustLink([[0, 200]]), OptionError, "MustLink needs pairs of different rows of 0 .. 199"),
        (MustLink([0, 1]), OptionError, "MustLink needs pairs of row indices"),
        (CannotLink([[0, 1], [1, 2]]), OptionError, "CannotLink pairs must not overlap"),
        ([MustLink([[0, 1]]), CannotLink([[0, 1]])], OptionError, "CannotLink pairs must not overlap"),
    ]
    for constraint, error, text in wrong:
        with pytest.raises(error, match=text):
            GaussianMixture(3, constraints=constraint).fit(X)
    with pytest.raises(OptionError, match="links of rows go with no noise_component"):
        GaussianMixture(3, constraints=MustLink([[0, 1]]), noise_component=True).fit(X)
    with pytest.raises(OptionError, match="nu > 2, got kappa=-1 and nu=5"):
        GaussianMixture(3, prior=NIW(kappa=-1)).fit(X)
    with pytest.raises(ShapeError, match=r"prior needs psi \(3, 3\)"):
        GaussianMixture(3, prior=NIW(psi=np.eye(2))).fit(X)
