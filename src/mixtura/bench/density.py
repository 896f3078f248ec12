"""Gaussian mixtures: the cost of an iteration of EM beside scikit-learn's and pomegranate's, from the same start.

Nobody starts anew nor converges: all go a fixed number of iterations from given parameters at tolerance 0, and the
time of a single one is taken off, so that checks of the input do not count. ``benchmarks/density/speed.py`` measures
whole fits and memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.bench.measuring import Contestant, Here, Watch, interleave
from mixtura.bench.peers import PeerError, There, Worker, worker
from mixtura.bench.report import Case

ROWS = 20_000
COLUMNS, COMPONENTS = (2, 8, 16, 32, 128), (2, 16)
FAMILIES, DTYPES = ("full", "tied", "diag", "spherical"), ("float64", "float32")
AGREEING = 3  # iterations after which means are compared
APART = 1e-3  # of the norm of the means: others are left out


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
        fit: makes a contestant that goes so many iterations.
        several: how many more than one.
    """

    def __init__(self, who: str, fit: Callable[[int], Contestant], several: int) -> None:
        self.who, self.several = who, several
        self._one, self._more = fit(1), fit(1 + several)

    def run(self, times: int, clock: str = "wall") -> Sequence[float]:
        """Seconds of each of so many runs, by one of ``CLOCKS``."""
        pairs = [(self._one.run(1, clock)[0], self._more.run(1, clock)[0]) for _ in range(times)]
        return [max(more - one, 1e-9) / self.several for one, more in pairs]


def density(
    watch: Watch, peers: Mapping[str, Path], versions: dict[str, str], *, wanted: Callable[[str], bool], rounds: int
) -> Iterator[Case]:
    """Time an iteration of EM of 20,000 rows; ``error`` is how far means lie from scikit-learn's after three.

    Args:
        watch: over the machine.
        peers: interpreters by name; scikit-learn is in this environment.
        versions: gets those of scikit-learn and of the peers.
        wanted: whether a case of that name is, such as "full/d8/k16/float64".
        rounds: as in ``interleave``.
    """
    import torch
    from threadpoolctl import threadpool_limits

    versions["scikit-learn"] = importlib.metadata.version("scikit-learn")
    with contextlib.ExitStack() as stack:
        importlib.import_module("mixtura.density")  # with all libraries that have threads
        stack.enter_context(threadpool_limits(torch.get_num_threads()))
        there = None
        if "pomegranate" in peers:
            there = stack.enter_context(_pomegranate(peers["pomegranate"], watch, versions))
        for kind, d, k, dtype in product(FAMILIES, COLUMNS, COMPONENTS, DTYPES):
            name = f"{kind}/d{d}/k{k}/{dtype}"
            if wanted(name):
                yield _case(name, Start(ROWS, d, k, kind, dtype), 10 if d <= 32 else 3, there, watch, rounds)


@contextlib.contextmanager
def _pomegranate(python: Path, watch: Watch, versions: dict[str, str]) -> Iterator[Worker]:
    import torch

    threads = torch.get_num_threads()
    with worker(python, "pomegranate_mixture", threads) as there:
        versions |= there.ask("load", threads=threads)["versions"]
        watch.own.add(there.pid)
        yield there


def _case(name: str, start: Start, several: int, there: Worker | None, watch: Watch, rounds: int) -> Case:
    """Check that everybody takes the same steps, then time them."""
    means = {"mixtura": start.ours(AGREEING).means_}
    contestants: list[Contestant] = [
        Iterations("mixtura", lambda n: Here("", lambda: start.ours(n)), several),
        Iterations("scikit-learn", lambda n: Here("", lambda: start.sklearn(n)), several),
    ]
    left_out = {}
    if there is not None:
        try:
            means["pomegranate"] = _means_there(there, start, several)
            contestants.append(Iterations("pomegranate", lambda n: There(str(n), there), several))
        except PeerError as error:
            left_out["pomegranate"] = str(error)
    reference = start.sklearn(AGREEING).means_
    errors = {who: float(np.linalg.norm(one - reference) / np.linalg.norm(reference)) for who, one in means.items()}
    left_out |= {who: f"its means are off by {error:.2g}" for who, error in errors.items() if not error <= APART}
    outcome = interleave([one for one in contestants if one.who not in left_out], watch, rounds=rounds)
    watch.release()
    return Case(name, outcome, errors=errors, left_out=left_out)


def _means_there(there: Worker, start: Start, several: int) -> Any:
    """Means of a worker that has got table and start; from now on it goes on from them."""
    at = start.start
    arrays = {"X": start.X, "weights": at.weights_, "means": at.means_, "covariances": at.covariances_}
    with tempfile.TemporaryDirectory() as folder:
        for name, array in arrays.items():
            np.save(Path(folder) / f"{name}.npy", array)
        there.ask("case", folder=folder, kind=start.kind, iterations=[1, 1 + several])
        there.ask("output", iterations=AGREEING, path=f"{folder}/out.npy")
        return np.load(f"{folder}/out.npy")


def _quietly(fit: Callable[[Any], Any], X: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neither is meant to converge
        return fit(X)
