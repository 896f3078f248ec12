"""Load balancing with null experts: they do their share together, not each alone.

    loss = E * sum_e f_e P_e,   f_e = share of the filled slots of e, for a null expert its mean over the null experts

1 at balance, as ``load-balancing``, which it is without null experts. It does not change when null experts change
places, and leaves free how a token divides its choices among them. f is a constant.

Reference: Zeng et al. (AdaMoE), arXiv:2406.13233.

E experts, null ones included, which are the last ones.
"""

from __future__ import annotations

import torch

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.core.routing import Routing, load, only
from mixtura.nn.balance.load_balancing import load_balancing_loss


@method("null-balance", role="balance", paper="arXiv:2406.13233", seeds=("000",))
def null_balance_loss(
    routing: Routing, *, mask_T: torch.Tensor | None = None, load_E: torch.Tensor | None = None, null_experts: int
) -> torch.Tensor:
    """Switch load-balancing loss whose null experts are pooled.

    Args:
        routing: of one layer; logits (T, E).
        mask_T: True where a token counts; padding must be False.
        load_E: f, from a statistic over more tokens; None is that of this routing.
        null_experts: m, the last ones of the E.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        OptionError: if there are not that many experts beside a true one.
        ShapeError: if mask_T has another length than the routing or is not boolean, or load_E has not E entries.
    """
    if not 1 <= null_experts < routing.num_experts:
        raise OptionError(f"null_experts must lie in 1 .. {routing.num_experts - 1}, got {null_experts}")
    f_E = (load(only(routing, mask_T)) if load_E is None else load_E).clone()
    f_E[-null_experts:] = f_E[-null_experts:].mean()
    return load_balancing_loss(routing, mask_T=mask_T, load_E=f_E)
