"""Iterations that the covariance families need: a shape that components share, an orientation that they share.

K components, D columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def varying_shape(spread_KD: Floats, count_K: Floats) -> Floats:
    """Equal volume, own shapes (EVI): each spread scaled to the common volume."""
    root_K = np.exp(np.log(spread_KD).mean(1))
    return spread_KD / root_K[:, None] * (root_K.sum() / count_K.sum())


def common_shape(spread_KD: Floats, count_K: Floats, *, rounds: int = 500) -> Floats:
    """Own volumes, one shape (VEI), by turns until neither moves; the problem is convex in the logarithms."""
    volume_K = spread_KD.mean(1) / count_K
    for _ in range(rounds):
        pooled_D = (spread_KD / volume_K[:, None]).sum(0)
        shape_D = pooled_D / np.exp(np.log(pooled_D).mean())
        before_K, volume_K = volume_K, (spread_KD / shape_D).mean(1) / count_K
        if not np.any(np.abs(volume_K - before_K) > 1e-13 * volume_K):
            break
    return volume_K[:, None] * shape_D


def rotate_jointly(matrices_KDD: Floats, precision_KD: Floats) -> Floats:
    """The rotation Q after one sweep of pairs, each of which lowers sum_k tr(diag(precision_k) Q.T M_k Q) as far as it
    goes.
    """
    D = precision_KD.shape[1]
    turned_KDD, turn_DD = matrices_KDD.copy(), np.eye(D)
    for i in range(D - 1):
        for j in range(i + 1, D):
            pair = [i, j]
            gain_K = precision_KD[:, i] - precision_KD[:, j]
            block = np.tensordot(gain_K, turned_KDD[:, [[i, i], [j, j]], [pair, pair]], 1)
            rotation = _smallest_direction(block)
            turned_KDD[:, :, pair] = turned_KDD[:, :, pair] @ rotation
            turned_KDD[:, pair] = rotation.T @ turned_KDD[:, pair]
            turn_DD[:, pair] = turn_DD[:, pair] @ rotation
    return turn_DD


def _smallest_direction(block: Floats) -> Floats:
    """The rotation by at most a quarter turn whose first column has the least v.T block v."""
    angle = 0.5 * np.arctan2(-2 * block[0, 1], block[1, 1] - block[0, 0])
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])
