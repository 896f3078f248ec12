"""Robust self-training: closed forms against brute force, the optimum against linear programs and grids."""

import numpy as np
import pytest
from scipy.optimize import check_grad, linprog, minimize
from sklearn.utils.estimator_checks import estimator_checks_generator

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density import RobustSelfTraining, robust_loss
from mixtura.density.robust_self_training import Terms, exact_objective, objective

LOSSES = ("zero-one", "hinge")


def clusters(seed, n, center, labels=True):
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) % 2, 1, -1)
    X = y[:, None] * np.asarray(center) + rng.normal(size=(n, len(center)))
    return (X, y) if labels else X


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_robust_loss_is_the_worst_over_a_grid_of_moves(loss, gamma):
    w, b = np.array([0.8, -1.7]), 0.3
    X = np.random.default_rng(0).normal(size=(12, 2)) * 2
    steps = np.stack(np.meshgrid(*[np.linspace(-6, 6, 301)] * 2), -1).reshape(-1, 2)
    for y in (1, -1):
        found = robust_loss(y * (X @ w + b), float(np.linalg.norm(w)), gamma, loss=loss)
        for x, value in zip(X, found, strict=True):
            margins = y * ((x + steps) @ w + b)
            plain = (margins <= 0) if loss == "zero-one" else np.maximum(0, 1 - margins)
            cost = np.linalg.norm(steps, axis=1) ** (1 if loss == "zero-one" else 2)
            worst = (plain - gamma * cost).max()
            assert worst <= value + 1e-9  # no move of the grid is worse
            assert value <= worst + gamma * 0.06  # and one of them is about as bad


@pytest.mark.parametrize("loss", LOSSES)
def test_robust_loss_is_never_below_the_unmoved_one_and_falls_with_the_price(loss):
    margins = np.linspace(-3, 3, 61)
    unmoved = robust_loss(margins, 2.0, np.inf, loss=loss)
    assert np.allclose(unmoved, (margins <= 0) if loss == "zero-one" else np.maximum(0, 1 - margins))
    values = [robust_loss(margins, 2.0, gamma, loss=loss) for gamma in (0.1, 1, 10)]
    assert (values[0] >= values[1]).all()
    assert (values[1] >= values[2]).all()
    assert (values[2] >= unmoved).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("intercept", [0.0, 1.0])
@pytest.mark.parametrize("width", [1.0, 0.1])
def test_the_gradient_is_that_of_the_objective(loss, intercept, width):
    X, y = clusters(0, 9, [1, 0, -1])
    terms = Terms(X * y[:, None], y * intercept, clusters(1, 14, [1, 0, 0], labels=False), 0.7, 1.3, 0.6, loss)
    theta = np.random.default_rng(2).normal(size=4)
    slope = objective(theta, terms, width)[1]
    assert check_grad(lambda t: objective(t, terms, width)[0], lambda t: objective(t, terms, width)[1], theta) < 1e-5
    assert np.abs(slope[:3]).min() > 0
    assert (slope[3] != 0) == bool(intercept)


@pytest.mark.parametrize("loss", LOSSES)
def test_smoothing_ends_at_the_objective(loss):
    X, y = clusters(3, 30, [1, 1])
    terms = Terms(X * y[:, None], y * 1.0, clusters(4, 50, [1, 0], labels=False), 0.7, 0.5, 0.8, loss)
    theta = np.array([0.6, 0.9, -0.2])
    gaps = [abs(objective(theta, terms, width)[0] - exact_objective(theta, terms)) for width in (1, 0.1, 0.01, 1e-3)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2e-3


def test_without_unlabeled_rows_and_moves_it_is_empirical_risk_minimization():
    X, y = clusters(5, 60, [0.6, 0.3])
    fitted = RobustSelfTraining(loss="hinge", gamma=np.inf).fit(X, y)
    N, D = X.shape  # min mean(e): e >= 1 - y (x w + b), e >= 0, as a linear program of w, b, e
    signed = np.column_stack([X, np.ones(N)]) * y[:, None]
    program = linprog(
        np.r_[np.zeros(D + 1), np.full(N, 1 / N)],
        A_ub=np.column_stack([-signed, -np.eye(N)]),
        b_ub=-np.ones(N),
        bounds=[(None, None)] * (D + 1) + [(0, None)] * N,
    )
    assert fitted.objective_ == pytest.approx(program.fun, abs=2e-4)
    by_hand = np.maximum(0, 1 - y * fitted.decision_function(X)).mean()
    assert fitted.objective_ == pytest.approx(by_hand)


def test_weight_of_nothing_leaves_unlabeled_rows_out():
    X, y = clusters(5, 60, [0.6, 0.3])
    alone = RobustSelfTraining(loss="hinge", gamma=2.0).fit(X, y)
    beside = RobustSelfTraining(loss="hinge", gamma=2.0, weight_unlabeled=0).fit(X, y, clusters(6, 99, [3, 0], False))
    assert (alone.coef_ == beside.coef_).all()


def test_free_of_moves_unlabeled_rows_are_self_labeled_as_they_are():
    X, y = clusters(7, 20, [1, 0])
    U = clusters(8, 80, [1, 0.5], labels=False)
    fitted = RobustSelfTraining(loss="hinge", gamma=np.inf, gamma_unlabeled=np.inf, weight_unlabeled=0.5).fit(X, y, U)
    scores = fitted.decision_function(U)
    own = np.minimum(*(np.maximum(0, 1 - label * scores) for label in (1, -1)))
    labeled = np.maximum(0, 1 - y * fitted.decision_function(X))
    assert fitted.objective_ == pytest.approx(labeled.mean() + 0.5 * own.mean())


def test_the_robust_hinge_is_as_small_as_a_direct_search_finds():
    X, y = clusters(9, 40, [0.8, -0.5])
    fitted = RobustSelfTraining(loss="hinge", gamma=0.4).fit(X, y)

    def risk(theta):
        return robust_loss(y * (X @ theta[:2] + theta[2]), np.linalg.norm(theta[:2]), 0.4, loss="hinge").mean()

    found = minimize(risk, [0.5, -0.5, 0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    assert fitted.objective_ == pytest.approx(found.fun, abs=5e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_zero_one_optimum_is_that_of_all_directions(seed):
    X, y = clusters(seed, 12, [1.5, 0.5])
    U = clusters(seed + 10, 300, [1.5, 1.0], labels=False)
    fitted = RobustSelfTraining(gamma=1, gamma_unlabeled=0.7, weight_unlabeled=0.8, fit_intercept=False).fit(X, y, U)
    terms = Terms(X * y[:, None], 0.0 * y, U, 1, 0.7, 0.8, "zero-one")
    angles = np.linspace(0, 2 * np.pi, 2000)
    values = [exact_objective(np.array([np.cos(a), np.sin(a), 0]), terms) for a in angles]
    assert fitted.objective_ == pytest.approx(min(values), abs=2e-3)
    assert np.linalg.norm(fitted.coef_) == pytest.approx(1)
    assert fitted.intercept_.tolist() == [0]


def test_unlabeled_rows_turn_the_boundary_out_of_their_way():
    center = np.zeros(40)
    center[0] = 2
    X, y = clusters(0, 10, center)
    U = clusters(1, 1000, center + 0.02, labels=False)
    test, truth = clusters(2, 4000, center)
    alone = RobustSelfTraining(fit_intercept=False).fit(X, y).score(test, truth)
    both = RobustSelfTraining(fit_intercept=False, gamma_unlabeled=0.3).fit(X, y, U).score(test, truth)
    assert both > 0.96  # of 0.977 that can be had
    assert alone < 0.93


def test_units_go_with_prices():
    X, y = clusters(3, 30, [1, 1])
    U = clusters(4, 90, [1, 0.5], labels=False)
    plain = RobustSelfTraining(gamma=1, gamma_unlabeled=0.5).fit(X, y, U)
    scaled = RobustSelfTraining(gamma=0.25, gamma_unlabeled=0.125).fit(4 * X, y, 4 * U)
    np.testing.assert_allclose(scaled.coef_, plain.coef_, atol=2e-3)
    np.testing.assert_allclose(scaled.intercept_, 4 * plain.intercept_, atol=1e-2)


def test_classes_keep_their_names_and_order():
    X, y = clusters(3, 30, [1, 1])
    plain = RobustSelfTraining().fit(X, y)
    named = RobustSelfTraining().fit(X, np.where(y > 0, "a", "b"))
    np.testing.assert_allclose(named.coef_, -plain.coef_, atol=1e-6)
    assert (named.predict(X) == np.where(plain.predict(X) > 0, "a", "b")).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0}, "gamma must be"),
        ({"gamma": np.inf}, "finite where loss"),
        ({"gamma_unlabeled": -1.0}, "gamma_unlabeled"),
        ({"weight_unlabeled": -0.1}, "weight_unlabeled"),
        ({"loss": "logistic"}, "loss must be one of"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        RobustSelfTraining(**options).fit(*clusters(0, 10, [1, 1]))


def test_wrong_tables_are_named():
    X, y = clusters(0, 10, [1, 1])
    with pytest.raises(ShapeError, match="X_unlabeled must have the 2 columns"):
        RobustSelfTraining().fit(X, y, np.zeros((3, 1)))
    with pytest.raises(ValueError, match="X_unlabeled contains NaN"):
        RobustSelfTraining().fit(X, y, [[0, np.nan]])
    with pytest.raises(OptionError, match="two classes, got 3"):
        RobustSelfTraining().fit(X, np.arange(10) % 3)
    with pytest.raises(OptionError, match="gamma"):
        robust_loss([1.0], 1.0, -1)
    with pytest.raises(OptionError, match="norm"):
        robust_loss([1.0], -1.0, 1)


def checks():
    for loss in LOSSES:
        for estimator, check in estimator_checks_generator(RobustSelfTraining(loss=loss)):
            if check.func.__name__ != "check_array_api_input":
                arguments = "-".join(str(value) for value in check.keywords.values())
                yield pytest.param(estimator, check, id=f"{loss}-{check.func.__name__}-{arguments}")


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_checks(estimator, check):
    check(estimator)
