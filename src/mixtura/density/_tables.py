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
    """A torch tensor as a numpy array, one of half precision in float64; anything else as it is."""
    if not is_torch(x):
        return x
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() and x.element_size() < 4 else x).numpy()


def as_table(X: Any) -> Any:
    """What may be a table: tensors as arrays, what an array masks as NaN.

    Raises:
        OptionError: if it is a frame that is yet to be read, or holds dates.
    """
    X = as_numpy(X)
    if hasattr(X, "collect") and not hasattr(X, "shape"):
        raise OptionError(f"X must be a table, got a {type(X).__name__}: collect it first")
    if isinstance(X, np.ma.MaskedArray):
        return X.astype(X.dtype if X.dtype == np.float32 else np.float64).filled(np.nan)
    if hasattr(X, "columns") and hasattr(X, "dtypes"):
        for name, dtype in zip(X.columns, X.dtypes, strict=True):
            if _of_time(dtype):
                raise OptionError(f"column {name!r} of X must hold numbers, got {dtype}: say since when, in which unit")
    elif _of_time(getattr(X, "dtype", None)):
        raise OptionError(f"X must hold numbers, got {X.dtype}: say since when, in which unit")
    return X


def _of_time(dtype: Any) -> bool:
    """Whether a type of numpy, pandas or polars is one of dates, times or durations."""
    return getattr(dtype, "kind", "") in ("M", "m") or bool(getattr(dtype, "is_temporal", bool)())


def check_table(estimator: Any, X: Any, *, reset: bool) -> Floats:
    """A table of float32 or float64, in which NaN stands for a missing value.

    Raises:
        ValueError: if it is not a finite table (scikit-learn's own words), or OptionError if squares would overflow or
            a column of a frame holds no numbers.
    """
    given = as_table(X)
    try:
        X = validate_data(estimator, given, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", reset=reset)
    except (TypeError, ValueError) as error:
        column = _without_numbers(given) if hasattr(given, "columns") else None
        if column is None:
            raise
        raise OptionError(f"column {column!r} of X must hold numbers: {error}") from error
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
