"""Gaussian mixtures of mixtura beside scikit-learn's and pomegranate's, in one process: time, agreement, memory.

    python benchmarks/density/speed.py                      the small grid, some minutes
    python benchmarks/density/speed.py --grid full          n to 1e6, d to 128, k to 64, four families: an hour
    python benchmarks/density/speed.py --case whole         fits to the end
    python benchmarks/density/speed.py --case large --dtype float64     n = 1e7, d = 8, k = 16: seconds and peak memory
    python benchmarks/density/speed.py --out speed.json

Three questions, as a user has them:

  iteration   a fixed number of EM iterations from the same parameters (tolerance 0), less one: the cost of an iteration
  arrival     seconds until the likelihood that scikit-learn's fit ends with, less 1e-4, from the same start
  defaults    fit() as each comes, with the likelihood reached

Every number is the median of the repeats after a first run that is dropped. pomegranate is measured where it is
installed; it computes in float32 and has neither tied nor weighted starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import sklearn
from sklearn.mixture import GaussianMixture as SklearnMixture
from threadpoolctl import threadpool_info

import mixtura
from mixtura.bench.density import Start
from mixtura.density import GaussianMixture

try:
    import pomegranate
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel
except ImportError:
    pomegranate = None

ITERATIONS = 10
GRIDS = {
    "small": ((20_000,), (2, 8, 16, 32, 128), (2, 16), ("full", "tied", "diag", "spherical"), ("float64", "float32")),
    "full": (
        (10_000, 100_000, 1_000_000),
        (2, 8, 32, 128),
        (2, 16, 64),
        ("full", "tied", "diag", "spherical"),
        ("float64", "float32"),
    ),
}


class Case(Start):
    """A table and parameters that every program starts from, pomegranate's too."""

    def pomegranate(self, iterations: int) -> Any:
        """pomegranate's, whose tolerance is on the total log likelihood."""
        normals = [
            Normal(torch.tensor(mean, dtype=torch.float32), torch.tensor(covariance, dtype=torch.float32))
            for mean, covariance in zip(self.start.means_, self.start.covariances_, strict=True)
        ]
        priors = torch.tensor(self.start.weights_, dtype=torch.float32)
        model = GeneralMixtureModel(normals, priors=priors, max_iter=iterations, tol=-1e9)
        return model.fit(torch.tensor(self.X, dtype=torch.float32))


def seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median time of some runs after one that is dropped, and what the last returned."""
    result, times = work(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times), result


def per_iteration(fit: Callable[[int], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of an iteration: of several, less one, over how many more they are."""
    one, _ = seconds(lambda: fit(1), repeats)
    several, fitted = seconds(lambda: fit(1 + ITERATIONS), repeats)
    return max(several - one, 1e-9) / ITERATIONS, fitted


def iteration(case: Case, repeats: int) -> dict[str, float]:
    """Cost of an iteration, and how far the results lie apart."""
    ours, mine = per_iteration(case.ours, repeats)
    theirs, other = per_iteration(case.sklearn, repeats)
    apart = float(np.abs(mine.means_ - other.means_).max() / np.abs(other.means_).max())
    out = {"ours_ms": ours * 1e3, "sklearn_ms": theirs * 1e3, "ratio": theirs / ours, "means_apart": apart}
    if pomegranate is not None and case.kind == "full" and case.X.dtype == np.float32:
        try:
            theirs, _ = per_iteration(case.pomegranate, repeats)
        except torch.linalg.LinAlgError as error:
            return out | {"pomegranate": f"fails: {str(error)[:60]}"}
        out |= {"pomegranate_ms": theirs * 1e3, "pomegranate_ratio": theirs / ours}
    return out


def arrival(case: Case, repeats: int) -> dict[str, float]:
    """Seconds until scikit-learn's likelihood at its own default tolerance, less 1e-4."""
    theirs, other = seconds(lambda: case.sklearn(500, 1e-3), repeats)
    goal, needed = other.lower_bound_ - 1e-4, other.n_iter_
    while case.ours(needed).lower_bound_ < goal:
        needed += 1
    ours, _ = seconds(lambda: case.ours(needed), repeats)
    return {"ours_s": ours, "sklearn_s": theirs, "ratio": theirs / ours, "iterations": needed}


def defaults(case: Case, repeats: int) -> dict[str, float]:
    """``fit()`` as each comes, and the mean log likelihood of a row that it ends with."""
    ours, mine = seconds(lambda: GaussianMixture(case.k, covariance=case.kind, random_state=0).fit(case.X), repeats)
    theirs, other = seconds(
        lambda: SklearnMixture(case.k, covariance_type=case.kind, random_state=0).fit(case.X), repeats
    )
    scores = {"ours_score": mine.score(case.X), "sklearn_score": float(other.score(case.X))}
    return {"ours_s": ours, "sklearn_s": theirs, "ratio": theirs / ours, **scores}


def measured(grid: str, repeats: int, kinds: str, dtypes: str) -> Iterator[dict[str, Any]]:
    """Rows of the table."""
    for n, d, k, kind, dtype in product(*GRIDS[grid]):
        if kind not in kinds.split(",") or dtype not in dtypes.split(","):
            continue
        case = Case(n, d, k, kind, dtype)
        about = {"n": n, "d": d, "k": k, "covariance": kind, "dtype": dtype}
        yield {"what": "iteration", **about, **iteration(case, repeats)}


def whole(repeats: int) -> Iterator[dict[str, Any]]:
    """Whole fits."""
    for d, k in ((4, 8), (16, 16)):
        for what in (arrival, defaults):
            about = {"n": 50_000, "d": d, "k": k, "covariance": "full", "dtype": "float64"}
            yield {"what": what.__name__, **about, **what(Case(50_000, d, k, "full", "float64"), repeats)}


def large(dtype: str) -> dict[str, Any]:
    """Ten iterations on ten million rows from its own start; peak memory of the process, with the data."""
    X = Start(10_000_000, 8, 16, "full", dtype).X
    begun = time.perf_counter()
    fitted = GaussianMixture(16, random_state=0, max_iter=10, tol=0).fit(X)
    took = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"what": "large", "dtype": dtype, "seconds": took, "data_gb": X.nbytes / 1e9, "peak_gb": peak / 1e9,
            "score": fitted.lower_bound_}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    blas = [{key: one.get(key) for key in ("internal_api", "version", "num_threads")} for one in threadpool_info()]
    versions = {"mixtura": mixtura.__version__, "numpy": np.__version__, "scikit-learn": sklearn.__version__}
    if pomegranate is not None:
        versions |= {"pomegranate": pomegranate.__version__, "torch": torch.__version__}
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "blas": blas, **versions}


def main() -> None:
    """Measure, print a line for each, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument("--case", choices=["grid", "whole", "large"], default="grid")
    parser.add_argument("--covariance", default="full,tied,diag,spherical", help="of the grid, by comma")
    parser.add_argument("--dtype", default="float64,float32", help="by comma; of --case large, one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if pomegranate is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    cases = {
        "grid": lambda: measured(asked.grid, asked.repeats, asked.covariance, asked.dtype),
        "whole": lambda: whole(asked.repeats),
        "large": lambda: [large(asked.dtype)],
    }
    rows = []
    for row in cases[asked.case]():
        rows.append(row)
        print(
            "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
    if asked.out:
        with open(asked.out, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
