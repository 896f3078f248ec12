"""Entropy of the router: keeps a top-p router from flattening its probabilities to use more experts.

    loss = mean_t  -sum_e P_te log P_te        P = softmax(L), over real tokens, layer by layer, in nats

0 if every token is sure, log E if all experts are alike. Coefficient in the paper: 1e-4.

Reference: Huang et al., arXiv:2403.07652.
"""

from __future__ import annotations

import torch

from mixtura.core.arrays import float32
from mixtura.core.registry import method
from mixtura.core.routing import Routing, only


@method("dynamic-entropy", role="balance", paper="arXiv:2403.07652")
def dynamic_entropy_loss(routing: Routing, *, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean entropy of the tokens' distributions over experts.

    Args:
        routing: of one layer; logits (T, E).
        mask_T: True where a token counts; padding must be False.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        ShapeError: if mask_T has another length than the routing, or is not boolean.
    """
    logs_TE: torch.Tensor = float32(only(routing, mask_T).logits_TE).log_softmax(-1)
    return -(logs_TE.exp() * logs_TE).sum() / max(len(logs_TE), 1)
