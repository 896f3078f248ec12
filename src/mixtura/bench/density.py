"""Gaussian mixtures: the cost of an iteration of EM beside scikit-learn's, from the same parameters.

Neither starts anew nor converges: both go a fixed number of iterations from given parameters at tolerance 0, and the
time of a single one is taken off, so that checks of the input do not count. ``benchmarks/density/speed.py`` measures
whole fits, memory and pomegranate.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.bench.measuring import CLOCKS, Watch, interleave
from mixtura.bench.report import Case

ROWS = 20_000
COLUMNS, COMPONENTS = (2, 8, 16, 32, 128), (2, 16)
FAMILIES, DTYPES = ("full", "tied", "diag", "spherical"), ("float64", "float32")


class Start:
    """A table, and parameters that every program starts from.

    Args:
        n: rows, of clusters that overlap.
        d: columns.
        k: components.
        kind: covariance family by scikit-learn's name.
        dtype: of the table.
    """

    def __init__(self, n: int, d: int, k: int, kind: str, dtype: str) -> None:
        from mixtura.density import GaussianMixture

        generator = np.random.default_rng(0)
        centers_KD = 3 * generator.normal(size=(k, d))
        self.k, self.kind, self.X = k, kind, np.empty((n, d), dtype)
        for start in range(0, n, 100_000):
            part = self.X[start : start + 100_000]
            part[:] = generator.normal(size=part.shape) + centers_KD[generator.integers(0, k, len(part))]
        few = self.X[: max(20 * k, 2_000)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = GaussianMixture(k, covariance=kind, random_state=0, max_iter=1, tol=0, reg_covar=1e-3)
            self.start = one.fit(few)
        self.theirs = self.start.to_sklearn()

    def ours(self, iterations: int, tol: float = 0) -> Any:
        """Ours, going on from the start."""
        from mixtura.density import GaussianMixture

        at = self.start
        mixture = GaussianMixture.from_parameters(at.weights_, at.means_, at.covariances_, covariance=self.kind)
        mixture.set_params(warm_start=True, max_iter=iterations, tol=tol, reg_covar=1e-6)
        return _quietly(mixture.fit, self.X)

    def sklearn(self, iterations: int, tol: float = 0) -> Any:
        """scikit-learn's, from the same parameters, without its own k-means."""
        from sklearn.mixture import GaussianMixture

        given = {
            "weights_init": self.theirs.weights_ / self.theirs.weights_.sum(),
            "means_init": self.theirs.means_.astype(self.X.dtype),
            "precisions_init": self.theirs.precisions_.astype(self.X.dtype),
        }
        mixture = GaussianMixture(self.k, covariance_type=self.kind, max_iter=iterations, tol=tol, **given)
        mixture._initialize_parameters = lambda X, random_state, **_: mixture._initialize(X, None)
        return _quietly(mixture.fit, self.X)


class Iterations:
    """A contestant: seconds of an iteration, of several less one.

    Args:
        who: its name.
        fit: takes the number of iterations.
        several: how many more than one.
    """

    def __init__(self, who: str, fit: Callable[[int], Any], several: int) -> None:
        self.who, self._fit, self._several = who, fit, several

    def run(self, times: int, clock: str = "wall") -> Sequence[float]:
        """Seconds of each of so many runs, by one of ``CLOCKS``."""
        now, out = CLOCKS[clock], []
        for _ in range(times):
            marks = [now()]
            for iterations in (1, 1 + self._several):
                self._fit(iterations)
                marks.append(now())
            out.append(max(marks[2] - 2 * marks[1] + marks[0], 1e-9) / self._several)
        return out


def density(
    watch: Watch, peers: Mapping[str, Path], versions: dict[str, str], *, wanted: Callable[[str], bool], rounds: int
) -> Iterator[Case]:
    """Time an iteration of EM of 20,000 rows; ``error`` is how far the means lie apart after them.

    Args:
        watch: over the machine.
        peers: not used; scikit-learn is in this environment.
        versions: gets that of scikit-learn.
        wanted: whether a case of that name is, such as "full/d8/k16/float64".
        rounds: as in ``interleave``.
    """
    versions["scikit-learn"] = importlib.metadata.version("scikit-learn")
    for kind, d, k, dtype in product(FAMILIES, COLUMNS, COMPONENTS, DTYPES):
        name = f"{kind}/d{d}/k{k}/{dtype}"
        if not wanted(name):
            continue
        several, start = 10 if d <= 32 else 3, Start(ROWS, d, k, kind, dtype)
        ours, theirs = start.ours(3).means_, start.sklearn(3).means_
        apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        contestants = [
            Iterations("mixtura", start.ours, several),
            Iterations("scikit-learn", start.sklearn, several),
        ]
        outcome = interleave(contestants, watch, rounds=rounds)
        watch.release()
        yield Case(name, outcome, errors={"mixtura": apart})


def _quietly(fit: Callable[[Any], Any], X: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neither is meant to converge
        return fit(X)
