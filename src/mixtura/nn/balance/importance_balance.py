"""Importance loss: the weight that the gates give to the experts should be the same for all.

    loss = (deviation_e(I) / mean_e(I))^2        I_e = sum over real tokens of the weights of e

The squared coefficient of variation: 0 if all experts get equal weight, E - 1 if one gets all. The gradient goes
through the weights. Coefficient in the paper: 0.1. Unlike the load it can be even while some experts see many tokens
with small weights and others few with large ones.

It is not a mean over tokens: over several micro-batches its value is the mean of theirs, not that of their union.

Reference: Shazeer et al., arXiv:1701.06538, eq. 6-7.
"""

from __future__ import annotations

import torch

from mixtura.core.arrays import float32
from mixtura.core.registry import method
from mixtura.core.routing import Routing, dense, only


@method("importance-balance", role="balance", paper="arXiv:1701.06538")
def importance_balance_loss(routing: Routing, *, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Squared coefficient of variation of the experts' summed weights.

    Args:
        routing: of one layer; weights (T, K).
        mask_T: True where a token counts; padding must be False.

    Returns:
        A scalar; 0 if no token counts, or no weight was given.

    Raises:
        ShapeError: if mask_T has another length than the routing, or is not boolean.

    Source:
        Shazeer et al., arXiv:1701.06538, eq. 6-7.
    """
    importance_E: torch.Tensor = float32(dense(only(routing, mask_T))).sum(0)
    mean = importance_E.mean()
    # the experts' shares of the mean, so that a small sum of weights is not squared into nothing
    share_E = importance_E / torch.where(mean != 0, mean, 1)
    return (share_E - share_E.mean()).square().mean()
