"""Gaussian mixtures beyond single iterations: whole fits beside scikit-learn's, ten million rows, a file beyond memory.

    python benchmarks/density/speed.py                                  all, some minutes
    python benchmarks/density/speed.py --cases large-float64 stream     some
    python benchmarks/density/speed.py --out benchmarks/density/whole.json

  arrival     seconds until the likelihood that scikit-learn's fit ends with, less 1e-4, from the same start
  defaults    fit() as each comes, with the likelihood reached
  large       ten iterations on 1e7 rows of 8 columns, 16 components, from its own start: seconds, and peak memory with
              the data
  stream      partial_fit through a file whose rows do not fit the memory that the system gives (Linux)

Seconds are those of the processor, of all threads together, since machines are seldom quiet. They are medians of the
repeats after a first run that is dropped; large and stream run once. Each runs in a process of its own. A single
iteration is measured by ``mixtura bench density``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.mixture import GaussianMixture as SklearnMixture
from threadpoolctl import threadpool_info

import mixtura
from mixtura.bench.density import Start
from mixtura.bench.report import machine
from mixtura.density import GaussianMixture

REPEATS = 3
LARGE = {"n": 10_000_000, "d": 8, "k": 16}
BATCH = 100_000
GIVEN = 256 << 20  # bytes that the system gives beside what the program takes; the file has 640 MB


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Median processor time of some runs after one that is dropped, and what the last returned."""
    result, times = work(), []
    for _ in range(REPEATS):
        begun = time.process_time()
        result = work()
        times.append(time.process_time() - begun)
    return statistics.median(times), result


def arrival(case: Start) -> dict[str, float]:
    """Seconds until scikit-learn's likelihood at its own default tolerance, less 1e-4."""
    theirs, other = seconds(lambda: case.sklearn(500, 1e-3))
    goal, needed = other.lower_bound_ - 1e-4, other.n_iter_
    while case.ours(needed).lower_bound_ < goal:
        needed += 1
    ours, _ = seconds(lambda: case.ours(needed))
    return {"ours_s": ours, "sklearn_s": theirs, "ratio": theirs / ours, "iterations": needed}


def defaults(case: Start) -> dict[str, float]:
    """``fit()`` as each comes, and the mean log likelihood of a row that it ends with."""
    ours, mine = seconds(lambda: GaussianMixture(case.k, covariance=case.kind, random_state=0).fit(case.X))
    theirs, other = seconds(lambda: SklearnMixture(case.k, covariance_type=case.kind, random_state=0).fit(case.X))
    scores = {"ours_score": mine.score(case.X), "sklearn_score": float(other.score(case.X))}
    return {"ours_s": ours, "sklearn_s": theirs, "ratio": theirs / ours, **scores}


def whole(d: int, k: int) -> list[dict[str, Any]]:
    """Whole fits of 50,000 rows, full covariances, float64."""
    case = Start(50_000, d, k, "full", "float64")
    return [{"what": what.__name__, "n": 50_000, "d": d, "k": k, **what(case)} for what in (arrival, defaults)]


def large(dtype: str) -> list[dict[str, Any]]:
    """Ten iterations from its own start; peak memory of the process, with the data."""
    X = Start(LARGE["n"], LARGE["d"], LARGE["k"], "full", dtype).X
    begun = time.process_time()
    fitted = GaussianMixture(LARGE["k"], random_state=0, max_iter=10, tol=0).fit(X)
    took = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"what": "large", **LARGE, "dtype": dtype, "seconds": took, "data_gb": X.nbytes / 1e9}
    return [{**about, "peak_gb": peak / 1e9, "score": fitted.lower_bound_}]


def stream() -> list[dict[str, Any]]:
    """One pass over a memory-mapped file; reading it whole is tried first, and must fail."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        shape = (LARGE["n"], LARGE["d"])
        part = Start(1_000_000, LARGE["d"], LARGE["k"], "full", "float64").X
        table = np.lib.format.open_memmap(path, "w+", np.float64, shape)
        for start in range(0, len(table), len(part)):
            table[start : start + len(part)] = part
        del table, part
        rows = np.load(path, mmap_mode="r")
        mixture = GaussianMixture(LARGE["k"], random_state=0).partial_fit(rows[:BATCH])
        limit = _data_bytes() + GIVEN
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        refused = False
        try:
            np.load(path)
        except MemoryError:
            refused = True
        begun = time.process_time()
        for start in range(BATCH, len(rows), BATCH):
            mixture.partial_fit(rows[start : start + BATCH])
        took = time.process_time() - begun
        about = {"what": "stream", **LARGE, "file_gb": path.stat().st_size / 1e9, "given_gb": GIVEN / 1e9}
        return [{**about, "whole_refused": refused, "rows_seen": mixture.weight_seen_, "seconds": took,
                 "score": mixture.score(rows[:BATCH])}]  # fmt: skip


def _data_bytes() -> int:
    """Private memory of this process, that of files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


CASES: dict[str, tuple[Callable[..., list[dict[str, Any]]], tuple[Any, ...]]] = {
    "whole-8": (whole, (4, 8)),
    "whole-16": (whole, (16, 16)),
    "large-float64": (large, ("float64",)),
    "large-float32": (large, ("float32",)),
    "stream": (stream, ()),
}


def quietly(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Without warnings: nobody is meant to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def main() -> None:
    """Measure, print a line for each, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", help="JSON file")
    asked = parser.parse_args()
    rows = []
    for name in asked.cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            for row in alone.submit(quietly, *CASES[name]).result():
                rows.append(row)
                told = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                print("  ".join(f"{key} {value}" for key, value in told.items()))
    if asked.out:
        threads = max(one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas")
        versions = {"mixtura": mixtura.__version__, "numpy": np.__version__, "scikit-learn": sklearn.__version__}
        report = {"machine": machine(threads), "versions": versions, "rows": rows}
        Path(asked.out).write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
