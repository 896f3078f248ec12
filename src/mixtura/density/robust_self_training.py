"""A linear classifier from few labels and many unlabeled rows of a domain nearby: robust self-supervised training, RSS.

A row may be moved at a price of ``gamma`` for its distance; the robust loss is the worst that this can do:

    phi_gamma(x, y) = sup_z  loss(z, y) - gamma c(z, x)

Unlabeled rows get the label that the classifier itself gives them, and the same robust loss, so that the boundary keeps
away from where they are dense:

    min  mean_i phi_gamma(x_i, y_i)  +  weight_unlabeled * mean_j phi_gamma_unlabeled(x'_j, h(x'_j))

Of a linear classifier f(x) = w x + b, with m = y f(x), both losses have a closed form:

    "zero-one", c the distance:             clip(1 - gamma m / |w|, 0, 1), the ramp of the paper's simulations
    "hinge", c the square of the distance:  max(0, 1 - m + |w|^2 / (4 gamma))

N labeled rows, M unlabeled rows, D columns.

Source: Saberi, Najafi, Heidari, Movasaghinia, Motahari and Khalaj, arXiv:2310.00027, who publish no code of it. Kinks
are smoothed here by softplus, ever less, each stage a descent by L-BFGS from the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_number, check_whole_number

Floats = NDArray[np.floating]
LOSSES = ("zero-one", "hinge")
STAGES = np.geomspace(1, 1e-3, 7)  # widths of the smoothed kinks, in units of the loss


def robust_loss(margins: Any, norm: float, gamma: float, *, loss: str = "zero-one") -> Floats:
    """The worst loss of rows that may be moved at a price, for a linear classifier.

    Args:
        margins: (N,) y f(x), y of +-1; |f(x)| for the label that the classifier itself gives.
        norm: length of w.
        gamma: price, per distance ("zero-one") or per squared distance ("hinge"); infinite for none moved.
        loss: "zero-one" or "hinge".

    Returns:
        (N,)

    Raises:
        OptionError: naming the argument.
    """
    check_loss(loss)
    gamma, norm = check_price("gamma", gamma), check_number("norm", norm, 0)
    margins_N = np.asarray(margins, dtype=float)
    if loss == "hinge":
        return np.maximum(0, 1 - margins_N + norm**2 / (4 * gamma))
    if norm == 0 or np.isinf(gamma):
        return (margins_N <= 0).astype(float)
    return np.clip(1 - gamma * margins_N / norm, 0, 1)


def check_loss(loss: Any) -> None:
    """Raise ``OptionError`` unless the loss is known."""
    if loss not in LOSSES:
        raise OptionError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")


def check_price(name: str, value: Any) -> float:
    """A number above 0, or infinity.

    Raises:
        OptionError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 0:
        raise OptionError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


class RobustSelfTraining(ClassifierMixin, BaseEstimator):
    """A linear classifier of two classes, trained on labeled rows and on unlabeled ones of a domain nearby.

    Args:
        gamma: price of moving a labeled row; lower is more robust.
        gamma_unlabeled: price of moving an unlabeled row; lower keeps the boundary farther away from them.
        weight_unlabeled: lambda, what the mean over unlabeled rows counts beside that over labeled ones.
        loss: "zero-one" (prices are per distance, and finite) or "hinge" (per squared distance, may be infinite).
        fit_intercept: whether there is a b. Nothing but the labels keeps it from moving all rows to one side; center
            the rows and do without where classes are symmetric.
        max_iter: of L-BFGS, at most, at each of seven stages.

    Attributes:
        classes_: (2,) labels, of f < 0 and of f > 0.
        coef_: (1, D) w; of length 1 with "zero-one".
        intercept_: (1,) b.
        objective_: what was minimized, at the result, without smoothing.
        n_iter_: iterations of all stages.
        n_features_in_: D.
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        gamma_unlabeled: float = 1.0,
        weight_unlabeled: float = 1.0,
        loss: str = "zero-one",
        fit_intercept: bool = True,
        max_iter: int = 200,
    ) -> None:
        self.gamma = gamma
        self.gamma_unlabeled = gamma_unlabeled
        self.weight_unlabeled = weight_unlabeled
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, X_unlabeled: Any = None) -> Self:
        """Fit.

        Args:
            X: (N, D) labeled rows.
            y: (N,) labels of two classes.
            X_unlabeled: (M, D) unlabeled rows, or None.

        Raises:
            OptionError: naming the argument, or if there are not two classes.
            ShapeError: if X_unlabeled has other columns than X.
        """
        X_ND, y = validate_data(self, X, y, dtype=np.float64)
        signs_N = self._signs(y)
        unlabeled_MD = self._check_unlabeled(X_unlabeled)
        terms = Terms(X_ND * signs_N[:, None], signs_N * self.fit_intercept, unlabeled_MD, *self._check_options())
        theta = start(X_ND, signs_N, fit_intercept=self.fit_intercept)
        self.n_iter_ = 0
        for width in STAGES:
            done = minimize(objective, theta, (terms, width), "L-BFGS-B", jac=True, options={"maxiter": self.max_iter})
            theta, self.n_iter_ = done.x, self.n_iter_ + done.nit
        self.objective_ = exact_objective(theta, terms)
        length = np.linalg.norm(theta[:-1]) if self.loss == "zero-one" else 1.0
        self.coef_, self.intercept_ = theta[None, :-1] / length, theta[-1:] / length
        return self

    def _signs(self, y: Any) -> Floats:
        check_classification_targets(y)
        self.classes_, index_N = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise OptionError(
                f"y must hold two classes, got {len(self.classes_)} class(es). Only binary classification is supported."
            )
        return 2.0 * index_N - 1

    def _check_unlabeled(self, X_unlabeled: Any) -> Floats:
        if X_unlabeled is None:
            return np.empty((0, self.n_features_in_))
        unlabeled_MD = check_array(X_unlabeled, dtype=np.float64, input_name="X_unlabeled")
        if unlabeled_MD.shape[1] != self.n_features_in_:
            raise ShapeError(f"X_unlabeled must have the {self.n_features_in_} columns of X, got {unlabeled_MD.shape}")
        return unlabeled_MD

    def _check_options(self) -> tuple[float, float, float, str]:
        check_loss(self.loss)
        check_whole_number("max_iter", self.max_iter, 1)
        prices = check_price("gamma", self.gamma), check_price("gamma_unlabeled", self.gamma_unlabeled)
        if self.loss == "zero-one" and np.isinf(prices).any():
            raise OptionError(f"prices must be finite where loss is 'zero-one', which has no slope, got {prices}")
        return *prices, check_number("weight_unlabeled", self.weight_unlabeled, 0), self.loss

    def decision_function(self, X: Any) -> Floats:
        """f(x) of each row, (N,); the signed distance to the boundary with "zero-one"."""
        check_is_fitted(self)
        X_ND = validate_data(self, X, dtype=np.float64, reset=False)
        return X_ND @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each row, (N,)."""
        positive_N = self.decision_function(X) > 0
        return self.classes_[positive_N.astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class Terms(NamedTuple):
    """What the objective depends on.

    Attributes:
        signed_ND: labeled rows times their labels.
        ones_N: labels, or zeros without an intercept.
        unlabeled_MD: unlabeled rows.
        gamma: of labeled rows.
        gamma_unlabeled: of unlabeled rows.
        weight: of the unlabeled rows.
        loss: its name.
    """

    signed_ND: Floats
    ones_N: Floats
    unlabeled_MD: Floats
    gamma: float
    gamma_unlabeled: float
    weight: float
    loss: str


def start(X_ND: Floats, signs_N: Floats, *, fit_intercept: bool) -> Floats:
    """The direction between the class means, (D + 1,), with the boundary halfway."""
    means_2D = np.stack([X_ND[signs_N > 0].mean(0), X_ND[signs_N < 0].mean(0)])
    w_D = means_2D[0] - means_2D[1]
    length = np.linalg.norm(w_D)
    w_D = w_D / length if length > 0 else np.ones_like(w_D) / np.sqrt(len(w_D))
    return np.append(w_D, -w_D @ means_2D.mean(0) if fit_intercept else 0.0)


def exact_objective(theta: Floats, terms: Terms) -> float:
    """The objective without smoothing."""
    margins_N, scores_M, norm = margins(theta, terms)
    total = robust_loss(margins_N, norm, terms.gamma, loss=terms.loss).mean()
    if len(scores_M):
        own = robust_loss(np.abs(scores_M), norm, terms.gamma_unlabeled, loss=terms.loss)
        total += terms.weight * own.mean()
    return float(total)


def margins(theta: Floats, terms: Terms) -> tuple[Floats, Floats, float]:
    """Margins of labeled rows, scores of unlabeled ones, length of w."""
    b = theta[-1] if terms.ones_N.any() else 0.0
    margins_N = terms.signed_ND @ theta[:-1] + terms.ones_N * b
    return margins_N, terms.unlabeled_MD @ theta[:-1] + b, float(np.linalg.norm(theta[:-1]))


def objective(theta: Floats, terms: Terms, width: float) -> tuple[float, Floats]:
    """The smoothed objective of w and b, and its gradient, (D + 1,)."""
    margins_N, scores_M, norm = margins(theta, terms)
    form = zero_one if terms.loss == "zero-one" else hinge
    value, slope_N, pull = form(margins_N, norm, terms.gamma, width, own=False)
    value, slope_N, pull = value.mean(), slope_N / len(margins_N), pull.mean()
    gradient = np.append(slope_N @ terms.signed_ND, slope_N @ terms.ones_N)
    if len(scores_M) and terms.weight:
        added, slope_M, more = form(scores_M, norm, terms.gamma_unlabeled, width, own=True)
        slope_M = slope_M * terms.weight / len(scores_M)
        value, pull = value + terms.weight * added.mean(), pull + terms.weight * more.mean()
        gradient += np.append(slope_M @ terms.unlabeled_MD, slope_M.sum() if terms.ones_N.any() else 0.0)
    gradient[:-1] += pull * theta[:-1] / max(norm, np.finfo(float).tiny)
    return float(value), gradient


def zero_one(f: Floats, norm: float, gamma: float, width: float, *, own: bool) -> tuple[Floats, Floats, Floats]:
    """Smoothed robust zero-one loss of margins (or, of their ``own`` label, of scores): value, d/df, d/dnorm."""
    scale = gamma / max(norm, np.finfo(float).tiny)
    t = scale * f
    if own:
        value, slope = tent(t, 1.0, width)[:2]
    else:
        (up, d_up), (down, d_down) = softplus(1 - t, width), softplus(-t, width)
        value, slope = up - down, d_down - d_up
    return value, slope * scale, -slope * t / max(norm, np.finfo(float).tiny)


def hinge(f: Floats, norm: float, gamma: float, width: float, *, own: bool) -> tuple[Floats, Floats, Floats]:
    """Smoothed robust hinge loss: value, d/df, d/dnorm."""
    height = 1 + norm**2 / (4 * gamma)
    if own:
        value, slope, lift = tent(f, height, width)
    else:
        value, lift = softplus(height - f, width)
        slope = -lift
    return value, slope, lift * norm / (2 * gamma)


def tent(f: Floats, height: float, width: float) -> tuple[Floats, Floats, Floats]:
    """max(0, height - |f|), smoothed: value, d/df, d/dheight."""
    (left, d_left), (top, d_top), (right, d_right) = (softplus(one, width) for one in (f + height, f, f - height))
    return left - 2 * top + right, d_left - 2 * d_top + d_right, d_left - d_right


def softplus(x: Floats, width: float) -> tuple[Floats, Floats]:
    """max(0, x) with a kink as wide as ``width``, and its slope."""
    return width * np.logaddexp(0, x / width), expit(x / width)
