"""``Routing``: who works, and how much it counts.

T tokens, E experts, K slots a token. Index E is an empty slot: "no choice", weight 0. A routing is a sparse T x E
matrix, stored row by row in K slots; responsibilities of a Gaussian mixture and choices of an agent mixture are the
same object. Statistics are free functions that work on numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mixtura.core import arrays
from mixtura.core.arrays import Array
from mixtura.core.errors import ShapeError


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight; the triple that transformers' routers return.

    Attributes:
        logits_TE: raw scores, before selection; their width is the number of experts.
        weights_TK: gate of each slot; 0 in empty slots.
        indices_TK: expert of each slot, 0 .. E - 1, or E for an empty slot.
    """

    logits_TE: Array
    weights_TK: Array
    indices_TK: Array

    @property
    def num_experts(self) -> int:
        """E, without the empty slot."""
        return int(self.logits_TE.shape[-1])


def check(routing: Routing) -> Routing:
    """Return the routing if it keeps the contract.

    Raises:
        ShapeError: if shapes disagree, an index lies outside of 0 .. E, an empty slot has weight, or a token names an
            expert twice.
    """
    logits_TE, weights_TK, indices_TK = routing
    arrays.require_2d("logits_TE", logits_TE)
    arrays.require_2d("weights_TK", weights_TK)
    if weights_TK.shape != indices_TK.shape or len(logits_TE) != len(weights_TK):
        raise ShapeError(
            f"logits_TE {tuple(logits_TE.shape)}, weights_TK {tuple(weights_TK.shape)} and indices_TK "
            f"{tuple(indices_TK.shape)} must be (T, E), (T, K), (T, K)"
        )
    E = routing.num_experts
    if ((indices_TK < 0) | (indices_TK > E)).any():
        low, high = int(indices_TK.min()), int(indices_TK.max())
        raise ShapeError(f"indices_TK must lie in 0 .. {E} ({E} = empty slot), got {low} .. {high}")
    if (weights_TK[indices_TK == E] != 0).any():
        raise ShapeError("an empty slot must have weight 0")
    if (scatter_count(routing)[:, :E] > 1).any():
        raise ShapeError("a token names the same expert in two slots")
    return routing


def scatter_count(routing: Routing) -> Array:
    """How often each token names each expert: (T, E + 1), the last column counts empty slots."""
    return arrays.scatter_rows(routing.indices_TK, routing.indices_TK * 0 + 1, routing.num_experts + 1)


def dense(routing: Routing) -> Array:
    """The T x E matrix g that the routing stores."""
    return arrays.scatter_rows(routing.indices_TK, routing.weights_TK, routing.num_experts + 1)[
        :, : routing.num_experts
    ]


def keep(routing: Routing, mask_T: Array) -> Routing:
    """The routing with every slot of the tokens outside of ``mask_T`` emptied.

    Args:
        routing: of T tokens.
        mask_T: True where a token is to be routed; padding is False.

    Raises:
        ShapeError: if mask_T has another length than the routing, or is not boolean.
    """
    check_mask(routing, mask_T)
    kept_T1 = mask_T[:, None]
    return Routing(
        routing.logits_TE,
        arrays.where(kept_T1, routing.weights_TK, 0.0),
        arrays.where(kept_T1, routing.indices_TK, routing.num_experts),
    )


def only(routing: Routing, mask_T: Array | None) -> Routing:
    """The rows of the tokens inside of ``mask_T``, all of them without a mask; what is outside is never read.

    Args:
        routing: of T tokens.
        mask_T: True where a token counts; padding is False.

    Raises:
        ShapeError: if mask_T has another length than the routing, or is not boolean.
    """
    if mask_T is None:
        return routing
    check_mask(routing, mask_T)
    return Routing(routing.logits_TE[mask_T], routing.weights_TK[mask_T], routing.indices_TK[mask_T])


def counts(routing: Routing, mask_T: Array | None = None) -> Array:
    """Slots that each expert got, (E,), as integers; ``mask_T`` is True where a token counts."""
    return arrays.count(only(routing, mask_T).indices_TK, routing.num_experts + 1)[: routing.num_experts]


def load(routing: Routing, mask_T: Array | None = None) -> Array:
    """Share of the filled slots that each expert got, (E,); sums to 1 unless no slot is filled, then 0."""
    n_E = counts(routing, mask_T)
    return n_E / max(int(n_E.sum()), 1)


def importance(routing: Routing, mask_T: Array | None = None) -> Array:
    """Share of the gate's weight that each expert got, (E,) (Shazeer et al., arXiv:1701.06538, eq. 6)."""
    total_E = dense(only(routing, mask_T)).sum(0)
    total = total_E.sum()
    return total_E / (total if total != 0 else 1)


def violation(load_E: Array) -> float:
    """Maximal violation of balance, max(load) / mean(load) - 1 (arXiv:2408.15664, eq. 4).

    0 at balance, E - 1 when one expert takes all, and 0 by convention when no slot is filled.
    """
    mean = float(load_E.sum()) / len(load_E)
    return float(load_E.max()) / mean - 1 if mean else 0.0


def entropy(p_E: Array) -> float:
    """Entropy of a distribution over experts, in nats."""
    return -float(arrays.xlogx(p_E).sum())


def effective_experts(p_E: Array) -> float:
    """exp(entropy): how many experts would do as much if all worked equally; 1 .. E."""
    return math.exp(entropy(p_E))


def check_mask(routing: Routing, mask_T: Array) -> None:
    """Raise ``ShapeError`` unless ``mask_T`` is boolean, one entry a token; zeros and ones would pick rows 0 and 1."""
    if tuple(mask_T.shape) != (len(routing.indices_TK),) or not str(mask_T.dtype).endswith("bool"):
        raise ShapeError(
            f"mask_T must be boolean of shape ({len(routing.indices_TK)},), "
            f"got {mask_T.dtype} of shape {tuple(mask_T.shape)}"
        )
