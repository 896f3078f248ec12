"""Router z-loss: keeps logits small, so that the gate's float32 softmax stays exact and training stays stable.

    loss = mean_t (logsumexp_e L_te)^2        over real tokens, of the raw logits, layer by layer

Coefficient in the paper: 1e-3. Adding a constant to a token's logits leaves its routing alone and changes this loss; 0
at L = -log E. Gradient: 2 logsumexp(L_t) softmax(L_t) / T.

Paper versus code: in transformers only switch_transformers has it (fed with probabilities from 5.0 until 5.22).

Reference: Zoph et al. (ST-MoE), arXiv:2202.08906, eq. 5.
"""

from __future__ import annotations

import torch

from mixtura.core.arrays import float32
from mixtura.core.registry import method
from mixtura.core.routing import Routing, only


@method("router-z-loss", role="balance", paper="arXiv:2202.08906")
def router_z_loss(routing: Routing, *, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared log-partition of the router's logits.

    Args:
        routing: of one layer; logits (T, E).
        mask_T: True where a token counts; padding must be False.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        ShapeError: if mask_T has another length than the routing, or is not boolean.

    Source:
        Zoph et al., arXiv:2202.08906, eq. 5.
    """
    z_T: torch.Tensor = float32(only(routing, mask_T).logits_TE).logsumexp(-1)
    return z_T.square().sum() / max(len(z_T), 1)
