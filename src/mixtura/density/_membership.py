"""Semidefinite programs over membership matrices, by alternating directions, with a certificate.

    min sum_g <C_g, Z_g>     over     Z_g positive semidefinite and >= 0,  tr Z_g = t_g,  sum_g Z_g 1 = 1

N rows, G groups. One group of trace K is the relaxation of k-means; G = K groups of trace 1 are the clusters, Z_k being
1 1.T / n_k on the rows of cluster k.

For every vector m and every matrix P_g >= 0 the optimum is at least

    sum_g t_g eig_min(C_g - P_g + (m 1.T + 1 m.T) / 2) - sum(m)

since tr Z_g = t_g, and sum_g <(m 1.T + 1 m.T) / 2, Z_g> = sum(m). That is the bound, whatever the iterations did.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Relaxed(NamedTuple):
    """What alternating directions found.

    Attributes:
        Z_GNN: matrices that are >= 0 and nearly satisfy the rest.
        value: sum_g <C_g, Z_g>, which may lie below the optimum by as much as constraints are missed.
        bound: the optimum is not below this.
        n_iter: iterations.
        converged: whether ``tol`` was reached.
        state: to go on from.
    """

    Z_GNN: Floats
    value: float
    bound: float
    n_iter: int
    converged: bool
    state: tuple[Floats, ...]


def project(M_GNN: Floats, traces_G: Floats, sums_N: Floats) -> tuple[Floats, Floats]:
    """The nearest symmetric matrices with these traces and sums over rows and groups, and the multiplier m of the sums.

    Z_g = M_g + l_g I + (m 1.T + 1 m.T) / 2, where l and m solve the linear equations of the constraints.
    """
    G, N, _ = M_GNN.shape
    missing_G = traces_G - np.trace(M_GNN, axis1=1, axis2=2)  # N l_g + sum(m)
    missing_N = sums_N - M_GNN.sum((0, 2))  # sum(l) + G (N m + sum(m)) / 2
    total = (missing_N.sum() - missing_G.sum()) / (G * (N - 1)) if N > 1 else 0.0  # sum(m)
    l_G = (missing_G - total) / N
    m_N = (2 * (missing_N - l_G.sum()) / G - total) / N
    return M_GNN + l_G[:, None, None] * np.eye(N) + (m_N[:, None] + m_N) / 2, m_N


def positive_part(M_GNN: Floats) -> Floats:
    """The nearest positive semidefinite matrices."""
    values_GN, vectors_GNN = np.linalg.eigh(M_GNN)
    return (vectors_GNN * values_GN.clip(0)[:, None]) @ vectors_GNN.swapaxes(1, 2)


def solve(
    costs_GNN: Floats, traces_G: Floats, *, max_iter: int, tol: float, state: tuple[Floats, ...] | None = None
) -> Relaxed:
    """Minimize over membership matrices.

    Args:
        costs_GNN: C, symmetric.
        traces_G: t.
        max_iter: iterations at most.
        tol: of the distance between the three copies of Z and of their change, relative to the size of Z.
        state: of an earlier call with similar costs.
    """
    scale = float(np.abs(costs_GNN).max()) or 1.0
    costs, N = costs_GNN / scale, costs_GNN.shape[1]
    ones_N, n_iter, done = np.ones(N), 0, False
    if state is None:
        start, _ = project(np.zeros_like(costs), traces_G, ones_N)
        state = (start, start, np.zeros_like(costs), np.zeros_like(costs), np.array(5 * np.linalg.norm(costs) / N))
    psd, plus, dual_psd, dual_plus, step = state
    while n_iter < max_iter and not done:
        n_iter += 1
        Z, _ = project((psd - dual_psd + plus - dual_plus - costs / step) / 2, traces_G, ones_N)
        old = psd + plus
        psd, plus = positive_part(Z + dual_psd), (Z + dual_plus).clip(0)
        dual_psd, dual_plus = dual_psd + Z - psd, dual_plus + Z - plus
        apart, moved = np.hypot(np.linalg.norm(Z - psd), np.linalg.norm(Z - plus)), np.linalg.norm(psd + plus - old)
        done = bool(max(apart, moved) <= tol * np.linalg.norm(Z))
        if n_iter % 10 == 0 and not 0.2 * apart < moved < 5 * apart:  # keep both errors of a size
            factor = 2.0 if moved < apart else 0.5
            step, dual_psd, dual_plus = step * factor, dual_psd / factor, dual_plus / factor
    value = scale * float((costs * plus).sum())
    bound = scale * lower_bound(costs, traces_G, -step * dual_plus, -step * dual_psd)
    return Relaxed(plus, value, bound, n_iter, done, (psd, plus, dual_psd, dual_plus, step))


def lower_bound(costs_GNN: Floats, traces_G: Floats, plus_GNN: Floats, psd_GNN: Floats) -> float:
    """The bound of the head of this file; m is such that C - P - S + l I + (m 1.T + 1 m.T) / 2 is nearest to 0."""
    plus_GNN = plus_GNN.clip(0)
    rest_GNN = costs_GNN - plus_GNN - psd_GNN
    _, m_N = project(rest_GNN, 0 * traces_G, np.zeros(rest_GNN.shape[1]))
    slack_GNN = costs_GNN - plus_GNN + (m_N[:, None] + m_N) / 2
    return float(traces_G @ np.linalg.eigvalsh(slack_GNN)[:, 0] - m_N.sum())
