"""The expectation step, in chunks, and the loop around it.

N rows, M rows of a chunk, D columns, K components.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from mixtura.core.errors import OptionError
from mixtura.density._hidden import Hidden
from mixtura.density._parameters import Scores
from mixtura.density._rows import Index, Rows
from mixtura.density._statistics import Statistics
from mixtura.density._strategies import Factors, choose_strategy

Floats = NDArray[np.floating]


class Fit(NamedTuple):
    """What the loop found."""

    parameters: Any
    lower_bound: float
    n_iter: int
    converged: bool
    lower_bounds: list[float]
    statistics: Statistics | None = None


def expectation(
    rows: Rows,
    scores: Scores,
    *,
    algorithm: str = "auto",
    log_noise: float | None = None,
    links: Any = None,
    pooled: bool = False,
    n_jobs: int = 1,
) -> Statistics:
    """Sufficient statistics of rows under scores, chunk by chunk; nothing of N times K is kept.

    Args:
        rows: checked rows.
        scores: of the components.
        algorithm: "auto", "gemm" or "cholesky".
        log_noise: log weight + log density of the noise component, or None without one.
        links: maps the log scores (K, N) of all rows to ``Linked`` responsibilities, or None.
        pooled: whether components have one covariance, and second moments may be those of all together; then neither
            noise nor links.
        n_jobs: threads; results are added up in the order of the rows, whatever their number.
    """
    strategy = _strategy(rows, scores, algorithm, pooled=pooled)
    adjusted = None if links is None else links(_all_log_scores(rows, strategy), rows)

    def work(part: Index, prepare: Callable[[], Any]) -> tuple[Any, float, float]:
        features = prepare()
        if adjusted is None:
            shares_KM, norm_M = _shares(strategy.log_scores(features), rows, part, log_noise)
            log_likelihood = rows.weigh(norm_M, part)
        else:
            shares_KM, log_likelihood = adjusted.responsibilities_KN[:, part], 0.0
        shares_KM, noise = rows.weighted(shares_KM, part), 0.0
        if log_noise is not None:
            noise, shares_KM = float(shares_KM[-1].sum(dtype=np.float64)), shares_KM[:-1]
        return strategy.moments(shares_KM, features), log_likelihood, noise

    sums, log_likelihood, noise = None, strategy.common, 0.0
    for one, its_likelihood, its_noise in in_threads(work, _chunks(rows, strategy), n_jobs):
        sums = one if sums is None else sums + one
        log_likelihood, noise = log_likelihood + its_likelihood, noise + its_noise
    count_K, first_KD, second = strategy.unpack(sums)
    log_likelihood = log_likelihood if adjusted is None else adjusted.log_likelihood
    return Statistics(count_K, first_KD, second, strategy.reference_KD, log_likelihood, rows.total_weight, noise)


def moments_of(rows: Rows, given: NDArray[Any], K: int, *, diagonal: bool) -> Statistics:
    """Statistics of complete rows under given responsibilities (N, K) or components (N,), about components' means."""
    shift_D = rows.frame.shift_D
    count_K, first_KD = np.zeros(K), np.zeros((K, rows.D))
    for part in rows.slices(rows.D + K):
        shares_KM = rows.weighted(_given_shares(given[part], K), part)
        count_K += shares_KM.sum(1)
        first_KD += shares_KM @ (rows.data_ND[part] - shift_D)
    means_KD = shift_D + first_KD / np.maximum(count_K, np.finfo(float).tiny)[:, None]
    blank = Factors(
        Scores(np.zeros(K), means_KD, np.ones((K, rows.D) if diagonal else (K, rows.D, rows.D))), np.float64
    )
    sums: Any = 0.0
    for part in rows.slices(rows.D + K):
        shares_KM = rows.weighted(_given_shares(given[part], K), part)
        sums = sums + blank.moments(shares_KM, rows.data_ND[part])
    return Statistics(*blank.unpack(sums), means_KD, weight=rows.total_weight)


def _given_shares(given: NDArray[Any], K: int) -> Floats:
    return given.T.astype(np.float64) if given.ndim == 2 else (given == np.arange(K)[:, None]).astype(np.float64)


def evaluate(
    rows: Rows, scores: Scores, *, algorithm: str = "auto", log_noise: float | None = None
) -> Iterator[tuple[Index, Floats, Floats]]:
    """Of each chunk: which rows, their responsibilities (K or K + 1, M), and their log densities (M,)."""
    strategy = _strategy(rows, scores, algorithm)
    for part, prepare in _chunks(rows, strategy):
        yield part, *_shares(strategy.log_scores(prepare()), rows, part, log_noise)


def climb(
    step: Callable[[Any], Statistics],
    update: Callable[[Statistics, Any], Any],
    start: Any,
    *,
    max_iter: int,
    tol: float,
    bound: Callable[[Statistics, Any], float],
) -> Fit:
    """Expectation and maximization by turns until the bound moves by less than ``tol``.

    Args:
        step: the expectation step.
        update: the maximization step; it may go on from the parameters before.
        start: parameters to begin with.
        max_iter: at most so many turns.
        tol: of the bound.
        bound: what rises, of a row, given the statistics and the parameters that they belong to.
    """
    parameters, lower_bounds, statistics = start, [-np.inf], None
    for n_iter in range(1, max_iter + 1):
        statistics = step(parameters)
        lower_bounds.append(bound(statistics, parameters))
        parameters = update(statistics, parameters)
        if abs(lower_bounds[-1] - lower_bounds[-2]) < tol:
            return Fit(parameters, lower_bounds[-1], n_iter, True, lower_bounds[1:], statistics)
    return Fit(parameters, lower_bounds[-1], max_iter, False, lower_bounds[1:], statistics)


def _strategy(rows: Rows, scores: Scores, algorithm: str, *, pooled: bool = False) -> Any:
    if rows.incomplete or rows.noise is not None:
        return Hidden(rows, scores)
    return choose_strategy(scores, rows.frame, rows.data_ND.dtype, algorithm, rows.scatter_DD if pooled else None)


def _chunks(rows: Rows, strategy: Any) -> Iterator[tuple[Index, Callable[[], Any]]]:
    """Which rows a chunk has, and what makes its features."""
    if isinstance(strategy, Hidden):
        yield from strategy.chunks()
        return
    for part in rows.slices(strategy.numbers):
        yield part, partial(strategy.features, rows.data_ND[part])


def in_threads(work: Callable[..., Any], given: Iterator[tuple[Any, ...]], n_jobs: int) -> Iterator[Any]:
    """What ``work`` returns for each of the given arguments, in their order; few results wait at a time.

    The linear algebra of a chunk is too small to be split further, and keeps to one thread.
    """
    with nullcontext() if _blas_threads() == 1 else _blas().limit(limits=1, user_api="blas"):
        if n_jobs == 1:
            yield from (work(*one) for one in given)
            return
        with ThreadPoolExecutor(n_jobs) as pool:
            waiting = deque(pool.submit(work, *one) for one in islice(given, 2 * n_jobs))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, *one) for one in islice(given, 1))
                yield result


def threads(n_jobs: int | None) -> int:
    """Threads to use: as joblib reads ``n_jobs``, or as many as linear algebra would."""
    if n_jobs is not None:
        return effective_n_jobs(n_jobs)
    return _blas_threads()


def _blas_threads() -> int:
    return max((one.num_threads for one in _blas().lib_controllers if one.user_api == "blas"), default=1)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _shares(log_KM: Floats, rows: Rows, part: Index, log_noise: float | None) -> tuple[Floats, Floats]:
    """Responsibilities (K or K + 1, M), and the log density of each row."""
    known_KM = rows.log_known(part, len(log_KM))
    log_KM = log_KM if known_KM is None else (log_KM + known_KM).astype(log_KM.dtype)
    if log_noise is not None:
        log_KM = np.vstack([log_KM, noise_row(rows, part, log_noise, log_KM.dtype)])
    return normalize(log_KM)


def noise_row(rows: Rows, part: Index, log_noise: float, dtype: Any) -> Floats:
    """Log score of the noise component, (1, M); a row that is known to be of a component is none."""
    row = np.full((1, len(rows.data_ND[part])), log_noise, dtype)
    if rows.labels is not None and rows.labels.ndim == 1:
        row[0, rows.labels[part] >= 0] = -np.inf
    return row


def normalize(log_KM: Floats) -> tuple[Floats, Floats]:
    """Softmax over the first axis, and its log normalizer (M,); ``log_KM`` is overwritten.

    Raises:
        OptionError: if a row has density 0 under every component.
    """
    top_M = log_KM.max(0)
    if not np.isfinite(top_M).all():
        raise OptionError("X holds a row whose density is 0 under every component that it may belong to")
    log_KM -= top_M
    shares_KM = np.exp(log_KM, out=log_KM)
    total_M = shares_KM.sum(0)
    shares_KM /= total_M
    return shares_KM, np.log(total_M) + top_M


def _all_log_scores(rows: Rows, strategy: Any) -> Floats:
    out_KN = np.empty((strategy.K, rows.N), rows.data_ND.dtype)
    for part, prepare in _chunks(rows, strategy):
        out_KN[:, part] = strategy.log_scores(prepare())
    return out_KN


def fill_means(rows: Rows) -> Rows:
    """Rows with missing values replaced by the means of their columns; to start from."""
    if not rows.incomplete:
        return rows
    data_ND = np.where(np.isnan(rows.data_ND), rows.frame.shift_D.astype(rows.data_ND.dtype), rows.data_ND)
    return replace(rows, data_ND=data_ND)


def data_moments(rows: Rows) -> tuple[Floats, Floats]:
    """Mean (D,) and covariance (D, D) of the rows; missing values count as the means of their columns."""
    one = moments_of(fill_means(rows), np.zeros(rows.N, np.intp), 1, diagonal=False)
    return one.reference_KD[0], one.second[0] / max(one.weight - 1, 1.0)  # as mclust's default has it
