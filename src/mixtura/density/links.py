"""Pairs of rows that belong together, or apart. They act on the expectation step. N rows, K components.

Rows that must link are one draw of the component: their log scores add up. A pair that cannot link has the joint
distribution of its two components without the diagonal. Source: Shental et al., Computing Gaussian mixture models
with EM using equivalence constraints, NIPS 2003.

Pairs number the rows of ``fit``; a stream of batches (``partial_fit``) takes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError
from mixtura.density._rows import Rows

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Link:
    """Base of the constraints on pairs of rows."""

    pairs: Any

    def array(self, N: int) -> NDArray[np.intp]:
        """Pairs as (P, 2) indices of rows.

        Raises:
            OptionError: if they are not pairs of different rows of the data.
        """
        pairs = np.asarray(self.pairs)
        name = type(self).__name__
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise OptionError(f"{name} needs pairs of row indices, (P, 2) integers, got {pairs.dtype} {pairs.shape}")
        if (pairs < 0).any() or (pairs >= N).any() or (pairs[:, 0] == pairs[:, 1]).any():
            raise OptionError(f"{name} needs pairs of different rows of 0 .. {N - 1}")
        return pairs


class MustLink(Link):
    """Rows of a pair, and of pairs that overlap, come from the same component."""


class CannotLink(Link):
    """Rows of a pair come from different components; the pairs must not overlap.

    The weights are estimated as without the constraint, so the likelihood may fall a little.
    """


class Linked(NamedTuple):
    """Responsibilities under links, and the log likelihood."""

    responsibilities_KN: Floats
    log_likelihood: float


class Links:
    """The links of a fit, against its rows."""

    def __init__(self, links: Sequence[Link], N: int) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        must = [link.array(N) for link in links if isinstance(link, MustLink)]
        pairs = np.concatenate([*must, np.empty((0, 2), int)]).astype(int)
        graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(N, N))
        self.n_groups, self.group_N = connected_components(graph, directed=False)
        cannot = [self.group_N[link.array(N)] for link in links if isinstance(link, CannotLink)]
        self.apart = np.concatenate([*cannot, np.empty((0, 2), int)]).astype(int)
        if len(np.unique(self.apart)) < self.apart.size:
            raise OptionError("CannotLink pairs must not overlap, nor lie within rows that must link")

    def adjust(self, log_KN: Floats, rows: Rows, log_weights_K: Floats) -> Linked:
        """Responsibilities of all rows, given log scores; the weight of a component counts once for each group."""
        K = len(log_KN)
        known_KN = rows.log_known(slice(None), K)
        log_KN = log_KN.astype(np.float64) if known_KN is None else log_KN + known_KN
        density_KN = rows.weighted(log_KN - log_weights_K[:, None], slice(None))
        log_KG = np.stack([np.bincount(self.group_N, one_N, self.n_groups) for one_N in density_KN])
        log_KG += log_weights_K[:, None]
        top_G = log_KG.max(0)
        shares_KG = np.exp(log_KG - top_G)
        total_G = shares_KG.sum(0)
        shares_KG /= total_G
        log_likelihood = float((np.log(total_G) + top_G).sum())
        if len(self.apart):
            shares_KG, extra = self._separate(shares_KG, np.exp(log_weights_K))
            log_likelihood += extra
        return Linked(shares_KG[:, self.group_N], log_likelihood)

    def _separate(self, shares_KG: Floats, weights_K: Floats) -> tuple[Floats, float]:
        one_KP, two_KP = shares_KG[:, self.apart[:, 0]], shares_KG[:, self.apart[:, 1]]
        differ_P = 1 - (one_KP * two_KP).sum(0)
        if not (differ_P > 1e-300).all():
            raise OptionError("CannotLink: a pair cannot be of different components; it needs 2 n_components or more")
        shares_KG = shares_KG.copy()
        shares_KG[:, self.apart[:, 0]] = one_KP * (1 - two_KP) / differ_P
        shares_KG[:, self.apart[:, 1]] = two_KP * (1 - one_KP) / differ_P
        prior = 1 - float(weights_K @ weights_K)
        return shares_KG, float(np.log(differ_P).sum() - len(differ_P) * np.log(prior))


def find_links(constraints: Iterable[Any], N: int) -> Links | None:
    """The links among constraints, or None."""
    links = [constraint for constraint in constraints if isinstance(constraint, Link)]
    return Links(links, N) if links else None
