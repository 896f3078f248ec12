"""Load balancing among unlike experts: those that cost nothing may do more.

    loss = E * sum_e eta_e f_e P_e,   eta_e = 1 for a feed-forward expert, tau for one without computation

f_e is the share of the filled slots of e, a constant, P_e its mean probability. tau = 1 is ``load-balancing``; the
smaller tau, the more tokens go to zero, copy and constant experts.

Paper versus code: only inference was released; tau = 0.75 and the coefficient 0.01 are the paper's, whose loss has
neither the factor E nor f as a share.

Reference: Jin et al. (MoE++), arXiv:2410.07348.

E experts, of which the last ones compute nothing.
"""

from __future__ import annotations

import torch

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.core.routing import Routing, load, only
from mixtura.nn.balance.load_balancing import load_balancing_loss


@method("heterogeneous-balance", role="balance", paper="arXiv:2410.07348", seeds=("004",))
def heterogeneous_balance_loss(
    routing: Routing,
    *,
    mask_T: torch.Tensor | None = None,
    load_E: torch.Tensor | None = None,
    zero_computation: int,
    tau: float = 0.75,
) -> torch.Tensor:
    """Switch load-balancing loss that counts the experts without computation by tau.

    Args:
        routing: of one layer; logits (T, E).
        mask_T: True where a token counts; padding must be False.
        load_E: f, from a statistic over more tokens; None is that of this routing.
        zero_computation: zero, copy and constant experts, the last ones of the E.
        tau: what such an expert counts.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        OptionError: if there are not that many experts, or tau is not above 0.
        ShapeError: if mask_T has another length than the routing or is not boolean, or load_E has not E entries.
    """
    if not 0 <= zero_computation <= routing.num_experts:
        raise OptionError(f"zero_computation must lie in 0 .. {routing.num_experts}, got {zero_computation}")
    if not tau > 0:
        raise OptionError(f"tau must be above 0, got {tau}")
    f_E = load(only(routing, mask_T)) if load_E is None else load_E
    costs_E = (torch.arange(len(f_E), device=f_E.device) < len(f_E) - zero_computation).to(f_E.dtype)
    return load_balancing_loss(routing, mask_T=mask_T, load_E=f_E * (costs_E + tau * (1 - costs_E)))
