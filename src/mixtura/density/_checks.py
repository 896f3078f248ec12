"""What comes in: rows, weights, noise, numbers, checked and named. N rows, D columns, K components."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._labels import check_labels
from mixtura.density._products import Frame
from mixtura.density._rows import Rows
from mixtura.density._tables import as_numpy, check_table
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]


def check_rows(
    estimator: Any,
    X: Any,
    sample_weight: Any = None,
    noise_cov: Any = None,
    *,
    labels: Any = None,
    K: int,
    least: int | None = None,
    reset: bool = True,
) -> Rows:
    """Rows to fit to, at least ``least`` of them, or K; those of weight 0 are left out.

    Raises:
        OptionError, ShapeError: naming the argument.
    """
    data_ND = check_table(estimator, X, reset=reset)
    labels = check_labels(labels, len(data_ND), K)
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
    if len(data_ND) < (K if least is None else least):
        raise OptionError(f"n_components={K} is more than the {len(data_ND)} rows of X (n_samples={len(data_ND)})")
    return Rows(data_ND, weights_N, labels, noise, estimator.batch_size, kept_N)


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


def check_added(name: str, value: Any, D: int) -> Floats:
    """What is added to the variance of each column, (D,): a number, or one for each column.

    Raises:
        OptionError, ShapeError: naming the option.
    """
    added = np.asarray(value, dtype=np.float64)
    if added.shape not in ((), (D,)):
        raise ShapeError(f"{name} must be a number or ({D},), got shape {added.shape}")
    if not (np.isfinite(added).all() and (added >= 0).all()):
        raise OptionError(f"{name} must be finite and not negative, got {value!r}")
    return np.broadcast_to(added, D)


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


def check_flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False.

    Raises:
        OptionError: if it is not.
    """
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_prior(prior: Any) -> None:
    """Raise ``OptionError`` unless ``prior`` is a ``NIW`` or None."""
    if prior is not None and not isinstance(prior, NIW):
        raise OptionError(f"prior must be a NIW or None, got {prior!r}")


def random_numbers(random_state: Any) -> np.random.RandomState:
    """What draws random numbers.

    Raises:
        OptionError: if ``random_state`` is neither None, a seed, nor a ``RandomState``.
    """
    try:
        return check_random_state(random_state)
    except ValueError as error:
        raise OptionError(
            f"random_state must be None, a whole number from 0 to 2^32 - 1, or a RandomState, got {random_state!r}"
        ) from error


def check_number(name: str, value: Any, low: float) -> float:
    """``value`` as a finite number of at least ``low``.

    Raises:
        OptionError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value < np.inf:
        raise OptionError(f"{name} must be a number of at least {low}, got {value!r}")
    return float(value)
