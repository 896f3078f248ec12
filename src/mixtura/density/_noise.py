"""The noise component: uniform over the region of the data. N rows, D columns."""

from __future__ import annotations

import numpy as np

from mixtura.core.errors import OptionError
from mixtura.density._em import fill_means
from mixtura.density._rows import Rows

FIRST_WEIGHT = 0.05


def log_uniform_density(rows: Rows) -> float:
    """Log density of the uniform distribution on the smaller of two boxes: along the columns, or along principal axes.

    Raises:
        OptionError: if the data have no volume.
    """
    data_ND = fill_means(rows).data_ND - rows.frame.shift_D
    _, axes_DD = np.linalg.eigh(np.cov(data_ND.T).reshape(rows.D, rows.D))
    with np.errstate(divide="ignore"):
        log_volume = min(np.log(np.ptp(box_ND, axis=0)).sum() for box_ND in (data_ND, data_ND @ axes_DD))
    if not np.isfinite(log_volume):
        raise OptionError("noise_component needs data with a volume: a column of X is constant or depends on others")
    return -float(log_volume)
