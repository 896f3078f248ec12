"""What comes in: tables, labels, weights, noise, checked and named. N rows, D columns, K components."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import _check_sample_weight, validate_data

from mixtura.core.arrays import is_torch
from mixtura.core.errors import MixturaWarning, OptionError, ShapeError
from mixtura.density._products import Frame
from mixtura.density._rows import Rows

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


def check_rows(
    estimator: Any,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    noise_cov: Any = None,
    *,
    K: int,
    reset: bool = True,
) -> Rows:
    """Rows to fit to; those of weight 0 are left out.

    Raises:
        OptionError, ShapeError: naming the argument.
    """
    data_ND = check_table(estimator, X, reset=reset)
    labels = check_labels(as_numpy(y), len(data_ND), K)
    noise = check_noise(as_numpy(noise_cov), data_ND)
    weights_N, kept_N = None, None
    if sample_weight is not None:
        weights_N = _check_sample_weight(as_numpy(sample_weight), data_ND, dtype=np.float64, ensure_non_negative=True)
        kept_N = weights_N > 0
        if kept_N.all():
            kept_N = None
        else:
            data_ND, weights_N = data_ND[kept_N], weights_N[kept_N]
            labels, noise = (None if one is None else one[kept_N] for one in (labels, noise))
    if len(data_ND) < K:
        raise OptionError(f"n_components={K} is more than the {len(data_ND)} rows of X (n_samples={len(data_ND)})")
    return Rows(data_ND, weights_N, labels, noise, estimator.batch_size, kept_N)


def check_labels(y: Any, N: int, K: int) -> NDArray[Any] | None:
    """Components of rows, -1 where unknown, or probabilities of components; None where nothing is known.

    Raises:
        OptionError: if soft labels are negative, or all zero in a row.
        ShapeError: if there are not as many as rows, or soft labels do not have a column for each component.
    """
    if y is None:
        return None
    y = np.asarray(y)
    if len(y) != N:
        raise ShapeError(f"y must have a label for each of {N} rows, got {len(y)}")
    if y.ndim == 2 and y.shape[1] != 1:
        return _check_soft_labels(y, K)
    y = y.reshape(-1)
    whole = y.dtype.kind in "iub" or (y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.floor(y)).all())
    if not whole or (N and (y.min() < -1 or y.max() >= K)):
        warnings.warn(
            f"y is ignored: labels of components must be whole numbers from -1 (unknown) to {K - 1}, got "
            f"{y.dtype} such as {y[:3].tolist()}",
            MixturaWarning,
            stacklevel=2,
        )
        return None
    return None if (y == -1).all() else y.astype(np.intp)


def _check_soft_labels(y: NDArray[Any], K: int) -> Floats:
    if y.shape[1] != K:
        raise ShapeError(f"y must have a column for each of {K} components, got shape {y.shape}")
    y = y.astype(np.float64)
    if not (np.isfinite(y).all() and (y >= 0).all() and (y.sum(1) > 0).all()):
        raise OptionError("y of soft labels must be finite, not negative, and not all zero in a row")
    return y


def check_noise(noise_cov: Any, data_ND: Floats) -> Floats | None:
    """Variances (N, D) or covariances (N, D, D) of the noise of each row; None where there is none.

    Raises:
        ShapeError: if it has another shape.
        OptionError: if it is not finite, or not positive semidefinite.
    """
    if noise_cov is None:
        return None
    N, D = data_ND.shape
    noise = np.asarray(noise_cov, dtype=np.float64)
    if noise.shape not in ((N, D), (N, D, D)):
        raise ShapeError(f"noise_cov must be ({N}, {D}) or ({N}, {D}, {D}), got {noise.shape}")
    if not np.isfinite(noise).all():
        raise OptionError("noise_cov must be finite")
    least = noise.min() if noise.ndim == 2 else np.linalg.eigvalsh(noise).min()
    if least < -1e-10 * np.abs(noise).max():
        raise OptionError(f"noise_cov must be variances or positive semidefinite matrices, got {least:.3g}")
    return noise if noise.any() else None


def mixture_frame(weights_K: Floats, means_KD: Floats, variances_KD: Floats) -> Frame:
    """Center and scale of a mixture: they depend on no batch."""
    share_K = weights_K / weights_K.sum()
    shift_D = share_K @ means_KD
    return Frame(shift_D, np.sqrt(share_K @ (variances_KD + (means_KD - shift_D) ** 2)))


def check_whole_number(name: str, value: Any, low: int) -> int:
    """``value`` as an integer of at least ``low``.

    Raises:
        OptionError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise OptionError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, low: float) -> float:
    """``value`` as a finite number of at least ``low``.

    Raises:
        OptionError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value < np.inf:
        raise OptionError(f"{name} must be a number of at least {low}, got {value!r}")
    return float(value)
