"""A few clean rows and many noisy ones against all clean, clean alone, noisy alone.

The paper trains more than 80 diffusion models on images and proves bounds for mixtures of Gaussians. Here it is the
mixtures: 3 components of unit variance in 10 dimensions, 3 apart; 3000 rows, of which 10 % are clean and the others
have known noise of 0.4, 1 or 3 (the paper's images: about 0.4 of their spread). EM knows the noise of each row. Figure:
root mean square distance of the means found to the true ones.

How much a noisy row can be worth is known: with the labels given, its weight is 1 / (1 + s^2), so the error of the mix
cannot be below that of all clean rows times sqrt(1 / (0.1 + 0.9 / (1 + s^2))): 1.07, 1.35, 2.29 at the three levels.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning

from mixtura.density import GaussianMixture
from mixtura.evidence import Lab, Verdict, evidence

COMPONENTS, COLUMNS, APART = 3, 10, 3.0


def draw(rng, N):
    """Means whose mean distance is ``APART``, and rows."""
    means = rng.normal(size=(COMPONENTS, COLUMNS))
    gaps = [np.linalg.norm(means[i] - means[j]) for i in range(COMPONENTS) for j in range(i)]
    means *= APART / np.mean(gaps)
    return means, means[rng.integers(0, COMPONENTS, N)] + rng.normal(size=(N, COLUMNS))


def fit(X, noise_cov=None, init="kmeans", seed=0):
    """A mixture of round components."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is a number of iterations
        mixture = GaussianMixture(COMPONENTS, covariance="VII", init=init, tol=1e-5, max_iter=100, random_state=seed)
        return mixture.fit(X, noise_cov=noise_cov)


def distance(found, means):
    """Root mean square distance, each mean to its own."""
    squares = ((found.means_[:, None] - means) ** 2).sum(-1)
    return float(np.sqrt(squares[linear_sum_assignment(squares)].mean()))


def train(seed: int, rows: str, noise: float, N: int) -> dict[str, float]:
    """Distance of the means found from the true ones."""
    rng = np.random.default_rng(seed)
    means, clean = draw(rng, N)
    noisy_N = np.full(N, True) if rows == "noisy alone" else np.arange(N) >= N // 10
    level_N1 = noise * noisy_N[:, None]
    X = clean + level_N1 * rng.normal(size=clean.shape)
    noise_cov = np.tile(level_N1**2, COLUMNS)
    if rows == "all clean":
        mixture = fit(clean, seed=seed)
    elif rows == "clean alone":
        mixture = fit(clean[~noisy_N], seed=seed)
    elif rows == "noise ignored":
        mixture = fit(X, seed=seed)
    elif rows == "noisy alone":
        mixture = fit(X, noise_cov, seed=seed)
    else:
        mixture = fit(X, noise_cov, fit(clean[~noisy_N], seed=seed).predict_proba(X))
    return {"distance": distance(mixture, means)}


@evidence(
    "ambient-laws",
    claim="A tenth of clean data and the rest noisy nearly matches all clean data, which noisy data alone cannot",
    source="arXiv:2411.02780",
    figure="root mean square distance of means, lower is better",
    setting="3 Gaussians in 10 dimensions, 3 standard deviations apart, 3000 rows, 10 % clean, noise of 0.4, 1 and 3 "
    "standard deviations; EM that knows each row's noise, at most 100 iterations; no images",
    seeds=20,
)
def run(lab: Lab) -> Verdict:
    N = lab.pick(3000, smoke=300)
    for rows in ("all clean", "clean alone"):
        lab.arm(rows, train, rows=rows, noise=0.0, N=N)
    held, sentences = [], []
    for noise in (0.4, 1.0, 3.0):
        for rows in ("mix", "noisy alone", "noise ignored"):
            lab.arm(f"{rows}, {noise}", train, rows=rows, noise=noise, N=N)
        ratio = lab.mean("distance", f"mix, {noise}") / lab.mean("distance", "all clean")
        limit = (0.1 + 0.9 / (1 + noise**2)) ** -0.5
        gain = lab.difference("distance", f"mix, {noise}", "clean alone")
        alone = lab.difference("distance", f"noisy alone, {noise}", f"mix, {noise}")
        lab.difference("distance", f"noise ignored, {noise}", f"mix, {noise}")
        held += [ratio <= 1.3, gain.high < 0, alone.low > 0]
        sentences.append(
            f"at noise {noise:g} the mix has {ratio:.2f} times the distance of all clean (at best {limit:.2f}), {gain} "
            f"against clean alone, and noisy alone has {alone} more"
        )
    verdict = "holds" if all(held) else "partly" if any(held) else "does not hold here"
    return Verdict(verdict, "; ".join(sentences))
