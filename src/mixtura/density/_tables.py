"""Tables that come in: arrays, frames and tensors as one array of numbers. N rows, D columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data

from mixtura.core.arrays import is_torch
from mixtura.core.errors import OptionError

Floats = NDArray[np.floating]
LARGEST = 1e150  # squares must be finite


def as_numpy(x: Any) -> Any:
    """A torch tensor as a numpy array; anything else as it is."""
    return x.detach().cpu().numpy() if is_torch(x) else x


def check_table(estimator: Any, X: Any, *, reset: bool) -> Floats:
    """A table of float32 or float64, in which NaN stands for a missing value.

    Raises:
        ValueError: if it is not a finite table (scikit-learn's own words), or OptionError if squares would overflow or
            a column of a frame holds no numbers.
    """
    given = as_numpy(X)
    try:
        X = validate_data(estimator, given, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", reset=reset)
    except ValueError as error:
        if "could not convert" not in str(error) or not hasattr(given, "columns"):
            raise
        raise OptionError(f"column {_without_numbers(given)!r} of X must hold numbers: {error}") from error
    largest = max(float(np.fmax.reduce(X, axis=None)), -float(np.fmin.reduce(X, axis=None)))
    if largest > LARGEST:
        raise OptionError(f"X must lie within +-{LARGEST:.0e}, got {largest:.3g}: rescale the columns")
    return X


def _without_numbers(frame: Any) -> Any:
    """Name of the first column of a frame that cannot be read as numbers."""
    for name in frame.columns:
        try:
            np.asarray(frame[name], dtype=float)
        except (TypeError, ValueError):
            return name
    return None
