"""What is known of the components of rows: labels, and what is taken for them by mistake. N rows, K components."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._tables import as_numpy


def check_labels(labels: Any, N: int, K: int | None, name: str = "labels") -> NDArray[Any] | None:
    """Components of rows, -1 where unknown, or probabilities of components; None where nothing is known.

    Args:
        labels: what was given.
        N: rows.
        K: components; None for any number.
        name: of the argument, for errors.

    Raises:
        OptionError: if they are not whole numbers from -1 to K - 1; soft ones if negative, or all zero in a row.
        ShapeError: if there are not as many as rows, or soft labels do not have a column for each component.
    """
    if labels is None:
        return None
    labels = np.asarray(as_numpy(labels))
    if labels.ndim not in (1, 2) or len(labels) != N:
        raise ShapeError(f"{name} must have one for each of {N} rows, got shape {labels.shape}")
    if labels.ndim == 2 and labels.shape[1] != 1:
        return _check_soft(labels, K, name)
    labels = labels.reshape(-1)
    accepted = "whole numbers from 0" if K is None else f"components from 0 to {K - 1}"
    if labels.dtype.kind not in "biuf":
        words = [one for one in labels.tolist() if not isinstance(one, int | float)]
        if words:
            raise OptionError(f"Unknown label type: {name} must be {accepted}, or -1 where unknown, got {words[0]!r}")
        labels = labels.astype(np.float64)
    wrong_N = ~_whole(labels) | (labels < -1) | (labels >= (np.iinfo(np.intp).max if K is None else K))
    if wrong_N.any():
        seen = labels[wrong_N][0].item()
        raise OptionError(f"{name} must be {accepted}, or -1 where unknown, got {seen!r}")
    return None if (labels == -1).all() else labels.astype(np.intp)


def _whole(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of some numbers are whole."""
    if values.dtype.kind != "f":
        return np.ones(values.shape, bool)
    return np.isfinite(values) & (values == np.floor(values))


def _check_soft(labels: NDArray[Any], K: int | None, name: str) -> NDArray[np.floating]:
    if K is None or labels.shape[1] != K:
        wanted = "one column" if K is None else f"a column for each of {K} components"
        raise ShapeError(f"{name} must have {wanted}, got shape {labels.shape}")
    if labels.dtype.kind not in "biuf":
        raise OptionError(f"{name} must hold numbers, got {labels.dtype} such as {labels.flat[0]!r}")
    labels = labels.astype(np.float64)
    wrong_N = ~(np.isfinite(labels).all(1) & (labels >= 0).all(1) & (labels.sum(1) > 0))
    if wrong_N.any():
        seen = labels[wrong_N][0].tolist()
        raise OptionError(f"{name} must be finite, not negative, and not all zero in a row, got a row {seen}")
    return labels


def refuse_labels_in_y(y: Any, sizes: list[int]) -> None:
    """Raise ``OptionError`` if ``y``, which is ignored, is what labels look like, and the target of a pipeline is not.

    Args:
        y: what was given.
        sizes: numbers of components.
    """
    y = None if y is None else np.asarray(as_numpy(y))
    if y is None or y.dtype.kind not in "iuf" or not y.size:
        return
    partial = y.ndim == 1 and _partly_known(y)
    if partial or (y.ndim == 2 and y.shape[1] in sizes and _probabilities(y)):
        kind = "-1 beside other classes" if partial else "probabilities of components"
        raise OptionError(
            f"y is ignored, but holds {kind}, as labels do: pass labels= to have them used; a target that other steps "
            "of a pipeline need must hold other numbers"
        )


def _partly_known(y: NDArray[Any]) -> bool:
    """Whether there are classes from 0 and -1 for unknown; -1 and 1 alone are two classes."""
    return bool(y.min() == -1 and _whole(y).all() and not np.isin(y, (-1, 1)).all())


def _probabilities(y: NDArray[Any]) -> bool:
    """Whether each row sums to 1, or holds ones alone, which is unknown."""
    return bool(y.shape[1] > 1 and y.min() >= 0 and (np.isclose(y.sum(1), 1) | (y == 1).all(1)).all())
