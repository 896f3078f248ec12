"""Unsupervised pretraining: a mixture of many rows without labels makes few labels go far.

The paper proves a bound of sqrt(C_Phi / m) + sqrt(C_Psi / n) for a representation learned from m rows without labels
and a predictor learned from n labels, against sqrt(C_both / n) for labels alone, and runs nothing. Here its example of
a Gaussian mixture: ten components in 20 columns with one covariance, each of one of two classes, and 30 labels. The
representation is responsibilities. All arms choose their penalty from as many values on a seed of their own.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from mixtura.density import GaussianMixture
from mixtura.evidence import Lab, Verdict, evidence

K, D, LABELS, TEST = 10, 20, 30, 4000
SIZES = [50, 150, 500, 1500, 5000]


def draw(rng: np.random.Generator, m: int):
    """Rows without labels, labeled rows and labels, test rows and labels."""
    means_KD = 0.7 * rng.normal(size=(K, D))
    classes_K = rng.permutation(np.arange(K) % 2)
    component = rng.integers(K, size=LABELS + TEST + m)
    rows = means_KD[component] + rng.normal(size=(len(component), D))
    few, test = slice(LABELS), slice(LABELS, LABELS + TEST)
    y = classes_K[component]
    return rows[LABELS + TEST :], rows[few], y[few], rows[test], y[test]


def train(seed: int, arm: str, penalty: float, m: int = 0) -> dict[str, float]:
    """Share of test rows that are classified wrongly."""
    unlabeled, X, y, X_test, y_test = draw(np.random.default_rng(seed), m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever ended by its number of iterations is taken as it is
        if arm == "pretrained":
            mixture = GaussianMixture(K, covariance="EEE", n_init=5, random_state=seed).fit(unlabeled)
            model = make_pipeline(FrozenEstimator(mixture), LogisticRegression(C=1 / penalty))
        elif arm == "logistic regression":
            model = LogisticRegression(C=1 / penalty)
        else:
            model = MLPClassifier((64,), alpha=penalty, max_iter=1000, random_state=seed)
        error = 1 - model.fit(X, y).score(X_test, y_test)
    return {"error": float(error)}


@evidence(
    "unsup-pretraining-advantage",
    claim="Responsibilities of a mixture learned from many rows without labels need fewer labels than supervised "
    "learning, and the more rows, the better they are",
    source="arXiv:2303.01566",
    figure="share of errors on fresh rows, lower is better",
    setting="10 components in 20 columns, 30 labels, 50 to 5000 rows without labels, 10 seeds",
    seeds=10,
)
def run(lab: Lab) -> Verdict:
    grid, sizes = {"penalty": [0.01, 0.1, 1.0, 10.0]}, lab.pick(SIZES, smoke=[150, 1500])
    for arm in ("logistic regression", "network"):
        lab.tuned_arm(arm, train, grid=grid, figure="error", arm=arm)
    for m in sizes:
        lab.tuned_arm(f"pretrained on {m}", train, grid=grid, figure="error", arm="pretrained", m=m)
    errors = [lab.mean("error", f"pretrained on {m}") for m in sizes]
    best = min(("logistic regression", "network"), key=lambda arm: lab.mean("error", arm))
    gap = lab.difference("error", f"pretrained on {sizes[-1]}", best)
    half = gap.high < 0 and errors[-1] <= 0.5 * lab.mean("error", best)
    falls = errors == sorted(errors, reverse=True)
    said = ", ".join(f"{error:.3f} ({m} rows)" for m, error in zip(sizes, errors, strict=True))
    return Verdict(
        "holds" if half and falls else "partly" if gap.high < 0 else "does not hold here",
        f"Errors with 30 labels: {said}; {best}, the better one on labels alone, {lab.mean('error', best):.3f}; "
        f"difference {gap}; {'' if falls else 'not '}falling all the way.",
    )
