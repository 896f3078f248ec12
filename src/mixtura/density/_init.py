"""Where EM starts: components or responsibilities of rows. N rows, D columns, K components.

Known labels are kept: a class that has labelled rows starts at their mean, and those rows stay in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans, kmeans_plusplus

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._em import data_moments, fill_means
from mixtura.density._rows import Rows

Floats = NDArray[np.floating]
NAMES = ("kmeans", "whitened-kmeans", "hierarchical", "random")
SUBSET = 50_000  # rows that k-means sees
HIERARCHY = 2_000  # rows that agglomeration sees, as in mclust


def start(init: Any, rows: Rows, K: int, rng: np.random.RandomState) -> NDArray[Any]:
    """Responsibilities (N, K), or components (N,), to start from.

    Raises:
        OptionError: if ``init`` is not known, or there are fewer distinct rows than components.
        ShapeError: if it is an array of another shape.
    """
    if not isinstance(init, str):
        return given_responsibilities(init, rows, K)
    if init not in NAMES:
        raise OptionError(f"init must be one of {', '.join(NAMES)}, or responsibilities, got {init!r}")
    if K == 1:
        return np.zeros(rows.N, np.intp)
    if init == "random":
        shares_NK = rng.uniform(size=(rows.N, K)) + np.finfo(float).tiny
        return keep_labels(shares_NK / shares_NK.sum(1, keepdims=True), rows.labels)
    rows = fill_means(rows)
    axes = np.eye(rows.D) if init == "kmeans" else whitening(rows)
    components_N = (hierarchy if init == "hierarchical" else kmeans)(rows, axes, K, rng)
    return keep_labels(components_N, rows.labels)


def given_responsibilities(init: Any, rows: Rows, K: int) -> NDArray[Any]:
    """Given responsibilities, or components, of the rows that have weight."""
    if rows.kept_N is None:
        return check_responsibilities(init, rows.N, K)
    return check_responsibilities(init, len(rows.kept_N), K)[rows.kept_N]


def check_responsibilities(init: Any, N: int, K: int) -> NDArray[Any]:
    """Given responsibilities (N, K), normalized, or components (N,)."""
    given = np.asarray(init)
    if given.shape == (N,) and given.dtype.kind in "iu":
        if given.min() < 0 or given.max() >= K:
            raise OptionError(f"init of components must lie in 0 .. {K - 1}, got {given.min()} .. {given.max()}")
        return given
    if given.shape != (N, K):
        raise ShapeError(f"init must be responsibilities ({N}, {K}) or components ({N},), got shape {given.shape}")
    given = given.astype(np.float64)
    totals_N = given.sum(1, keepdims=True)
    if not (np.isfinite(given).all() and (given >= 0).all() and (totals_N > 0).all()):
        raise OptionError("init must hold finite responsibilities, not negative, with a sum above 0 in each row")
    return given / totals_N


def keep_labels(given: NDArray[Any], labels: NDArray[Any] | None) -> NDArray[Any]:
    """What was given, with known labels in the place of guesses."""
    if labels is None:
        return given
    if labels.ndim == 1 and given.ndim == 1:
        return np.where(labels >= 0, labels, given)
    K = given.shape[1] if given.ndim == 2 else labels.shape[1]
    shares_NK = given if given.ndim == 2 else np.eye(K)[given]
    known_NK = labels if labels.ndim == 2 else np.where(labels[:, None] >= 0, labels[:, None] == np.arange(K), 1.0)
    product_NK = shares_NK * known_NK
    product_NK = np.where(product_NK.sum(1, keepdims=True) > 0, product_NK, known_NK)
    return product_NK / product_NK.sum(1, keepdims=True)


def whitening(rows: Rows) -> Floats:
    """Axes (D, A) on which rows have variance 1; those without variance are left out."""
    scale_D = rows.frame.scale_D
    _, covariance_DD = data_moments(rows)
    values_D, turns_DD = np.linalg.eigh(covariance_DD / np.outer(scale_D, scale_D))
    kept_D = values_D > 1e-10 * max(values_D[-1], np.finfo(float).tiny)
    return turns_DD[:, kept_D] / np.sqrt(values_D[kept_D]) / scale_D[:, None]


def _on_axes(rows: Rows, part: Any, axes_DA: Floats) -> Floats:
    """Some of the rows, less their mean, on other axes."""
    return (rows.data_ND[part] - rows.frame.shift_D) @ axes_DA


def _everywhere(rows: Rows, axes_DA: Floats, nearest: Callable[[Floats], NDArray[np.intp]]) -> NDArray[np.intp]:
    """What is nearest to each row, chunk by chunk."""
    out_N = np.empty(rows.N, np.intp)
    for part in rows.slices(2 * rows.D + axes_DA.shape[1]):
        out_N[part] = nearest(_on_axes(rows, part, axes_DA))
    return out_N


def kmeans(rows: Rows, axes_DA: Floats, K: int, rng: np.random.RandomState) -> NDArray[np.intp]:
    """Clusters of weighted k-means on distinct rows, so that a row twice and a row of weight 2 are the same."""
    index = np.arange(rows.N) if rows.N <= SUBSET else np.sort(rng.choice(rows.N, SUBSET, replace=False))
    weights_N = None if rows.weights_N is None else rows.weights_N[index]
    points_PA, weights_P = _points(rows, index, axes_DA, weights_N, K)
    seeds_KA = _seeds(rows, axes_DA, points_PA, weights_P, K, rng)
    model = KMeans(K, init=seeds_KA, n_init=1, random_state=rng).fit(points_PA, sample_weight=weights_P)
    return _everywhere(rows, axes_DA, model.predict)


def _points(
    rows: Rows, index: NDArray[np.intp], axes_DA: Floats, weights_N: Floats | None, K: int
) -> tuple[Floats, Floats]:
    """Distinct rows on other axes, and their summed weights, in an order that does not depend on theirs.

    Rows are compared before they are turned: products round the same row differently at another place.
    """
    points_PD, weights_P = distinct(rows.data_ND[index], weights_N, K)
    points_PA = (points_PD - rows.frame.shift_D) @ axes_DA
    return (points_PA, weights_P) if axes_DA.shape[1] == rows.D else distinct(points_PA, weights_P, K)


def distinct(data_ND: Floats, weights_N: Floats | None, K: int) -> tuple[Floats, Floats]:
    """Distinct rows, sorted, and their summed weights.

    Raises:
        OptionError: if there are fewer than K.
    """
    points_PD, which_N = np.unique(data_ND, axis=0, return_inverse=True)
    if len(points_PD) < K:
        raise OptionError(f"n_components={K} is more than the {len(points_PD)} distinct rows of X")
    return points_PD, np.bincount(which_N.ravel(), weights_N, len(points_PD)).astype(float)


def _seeds(
    rows: Rows, axes_DA: Floats, points_PD: Floats, weights_P: Floats, K: int, rng: np.random.RandomState
) -> Floats:
    """Means of labelled classes, and k-means++ for the other components, which go on from those."""
    known, labels = {}, rows.labels
    if labels is not None and labels.ndim == 2:
        labels = np.where(labels.max(1) > 0.5 * labels.sum(1), labels.argmax(1), -1)
    if labels is not None:
        known = {k: _on_axes(rows, labels == k, axes_DA).mean(0) for k in np.unique(labels[labels >= 0])}
    if not known:
        return kmeans_plusplus(points_PD, K, sample_weight=weights_P, random_state=rng)[0]
    seeds = list(known.values())
    while len(seeds) < K:
        squares_PS = ((points_PD[:, None] - np.stack(seeds)) ** 2).sum(-1)
        chance_P = weights_P * squares_PS.min(1)
        seeds.append(points_PD[rng.choice(len(points_PD), p=chance_P / chance_P.sum())])
    free = iter(seeds[len(known) :])
    return np.stack([known[k] if k in known else next(free) for k in range(K)])


def hierarchy(rows: Rows, axes_DA: Floats, K: int, rng: np.random.RandomState) -> NDArray[np.intp]:
    """Groups of Ward's agglomeration of at most 2000 rows; the others go to the nearest group mean."""
    index = np.arange(rows.N) if rows.N <= HIERARCHY else np.sort(rng.choice(rows.N, HIERARCHY, replace=False))
    points_PA, _ = _points(rows, index, axes_DA, None, K)
    groups_P = AgglomerativeClustering(K, linkage="ward").fit_predict(points_PA)
    centers_KA = np.stack([points_PA[groups_P == k].mean(0) for k in range(K)])
    squares_K = (centers_KA**2).sum(1)
    return _everywhere(rows, axes_DA, lambda x_MA: (squares_K - 2 * x_MA @ centers_KA.T).argmin(1))
