"""The noise component: uniform over the region of the data. N rows, D columns."""

from __future__ import annotations

import numpy as np

from mixtura.core.errors import OptionError
from mixtura.density._em import data_moments, fill_means
from mixtura.density._rows import Rows

FIRST_WEIGHT = 0.05


def log_uniform_density(rows: Rows) -> float:
    """Log density of the uniform distribution on the smaller of two boxes: along the columns, or along principal axes.

    Raises:
        OptionError: if the data have no volume.
    """
    rows = fill_means(rows)
    _, axes_DD = np.linalg.eigh(data_moments(rows)[1])
    both_DA = np.hstack([np.eye(rows.D), axes_DD])
    low_A, high_A = np.full(2 * rows.D, np.inf), np.full(2 * rows.D, -np.inf)
    for part in rows.slices(4 * rows.D):
        values_MA = (rows.data_ND[part] - rows.frame.shift_D) @ both_DA
        low_A, high_A = np.minimum(low_A, values_MA.min(0)), np.maximum(high_A, values_MA.max(0))
    with np.errstate(divide="ignore"):
        log_volume = np.log(high_A - low_A).reshape(2, rows.D).sum(1).min()
    if not np.isfinite(log_volume):
        raise OptionError("noise_component needs data with a volume: a column of X is constant or depends on others")
    return -float(log_volume)
