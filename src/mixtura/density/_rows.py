"""The rows that a mixture is fitted to: data, weights, what is known of their components, their own noise.

N rows, M rows of a chunk, D columns, K components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mixtura.density._parameters import safe_log
from mixtura.density._products import Frame

Floats = NDArray[np.floating]
Index = slice | NDArray[np.intp]

CHUNK_NUMBERS = 1 << 18  # that the rows of a chunk take: 2 MiB in float64, twice the L2 cache that it was measured on
FRAME_ROWS = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
        data_ND: float32 or float64; NaN where a value is missing.
        weights_N: positive row weights, or None for 1.
        labels: component of each row, -1 where unknown, (N,); or probabilities of components, (N, K); or None.
        noise: variances (N, D) or covariances (N, D, D) of each row's own noise, or None.
        kept_N: which of the rows that were given are here, or None for all.
        batch_size: rows of a chunk, or None for as many as take ``CHUNK_NUMBERS``.
    """

    data_ND: Floats
    weights_N: Floats | None = None
    labels: NDArray | None = None
    noise: Floats | None = None
    batch_size: int | None = None
    kept_N: NDArray[np.bool_] | None = None
    given_frame: Frame | None = None  # where results must not depend on what else is in the batch

    @property
    def N(self) -> int:
        """Number of rows."""
        return len(self.data_ND)

    @property
    def D(self) -> int:
        """Number of columns."""
        return self.data_ND.shape[1]

    @cached_property
    def total_weight(self) -> float:
        """Sum of row weights."""
        return float(self.N) if self.weights_N is None else float(self.weights_N.sum())

    @cached_property
    def incomplete(self) -> bool:
        """Whether any value is missing."""
        return any(np.isnan(self.data_ND[part]).any() for part in self.slices(self.D))

    def slices(self, numbers_per_row: int) -> Iterator[slice]:
        """Chunks of rows of which each takes so many numbers; cut so that they stay near a core's cache."""
        size = self.batch_size or max(64, min(1 << 14, CHUNK_NUMBERS // max(1, numbers_per_row)))
        return (slice(start, min(start + size, self.N)) for start in range(0, self.N, size))

    @cached_property
    def frame(self) -> Frame:
        """Weighted mean and deviation of each column over its observed values; 0 and 1 where there are none or one."""
        if self.given_frame is not None:
            return self.given_frame
        shift_D, scale_D = np.zeros(self.D), np.ones(self.D)
        for column in range(self.D):
            self._frame_column(column, shift_D, scale_D)
        return Frame(shift_D, scale_D)

    def _frame_column(self, column: int, shift_D: Floats, scale_D: Floats) -> None:
        values_N, weights_N = self.data_ND[:, column], self.weights_N
        if self.incomplete:
            known_N = ~np.isnan(values_N)
            values_N, weights_N = values_N[known_N], None if weights_N is None else weights_N[known_N]
        if not len(values_N):
            return
        if weights_N is None:
            shift_D[column], spread = values_N.mean(dtype=np.float64), values_N.std(dtype=np.float64)
        else:
            shares_N = weights_N / weights_N.sum()
            shift_D[column] = shares_N @ values_N
            spread = np.sqrt(shares_N @ (values_N - shift_D[column]) ** 2)
        scale_D[column] = spread if spread > 0 else 1.0

    @cached_property
    def scatter_DD(self) -> Floats:
        """Weighted second moments of complete rows about the center, which no parameters change."""
        scatter_DD = np.zeros((self.D, self.D))
        shift_D = self.frame.shift_D.astype(self.data_ND.dtype)
        for part in self.slices(2 * self.D):
            z_MD = (self.data_ND[part] - shift_D).astype(np.float64, copy=False)
            scatter_DD += z_MD.T @ (z_MD if self.weights_N is None else z_MD * self.weights_N[part, None])
        return scatter_DD

    def known_columns(self) -> tuple[list[int], list[int]]:
        """Columns of which no value is observed, and columns whose observed values are all the same."""
        low_D, high_D = np.fmin.reduce(self.data_ND, axis=0), np.fmax.reduce(self.data_ND, axis=0)
        return np.flatnonzero(np.isnan(low_D)).tolist(), np.flatnonzero(low_D == high_D).tolist()

    def log_known(self, part: Index, K: int) -> Floats | None:
        """Log of what is known of the components of some rows, (K, M): 0 where they may be, -inf where they are not."""
        if self.labels is None:
            return None
        labels = self.labels[part]
        if labels.ndim == 2:
            return safe_log(labels.T.astype(np.float64))
        allowed_KM = (labels == np.arange(K)[:, None]) | (labels < 0)
        return np.where(allowed_KM, 0.0, -np.inf)

    def weighted(self, responsibilities_KM: Floats, part: Index) -> Floats:
        """Responsibilities times row weights."""
        return responsibilities_KM if self.weights_N is None else responsibilities_KM * self.weights_N[part]

    def weigh(self, values_M: Floats, part: Index) -> float:
        """Weighted sum."""
        total = values_M.sum(dtype=np.float64) if self.weights_N is None else values_M @ self.weights_N[part]
        return float(total)
