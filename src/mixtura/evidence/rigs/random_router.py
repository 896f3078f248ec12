"""A router that draws experts at random: what a router has to be better than."""

from __future__ import annotations

import torch

from mixtura.core.routing import Routing
from mixtura.nn.routers.base import BaseRouter


class RandomRouter(BaseRouter):
    """k different experts for every token, drawn anew in every call, each with weight 1 / k.

    Args:
        num_experts: E.
        k: experts a token.
    """

    def __init__(self, num_experts: int, k: int) -> None:
        super().__init__(num_experts)
        self.k = k

    @property
    def slots(self) -> int:
        """k."""
        return self.k

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens; hidden states are not read, logits are zeros."""
        logits_TE = torch.zeros(len(hidden_TD), self.num_experts)
        indices_TK = torch.rand_like(logits_TE).topk(self.k).indices
        return Routing(logits_TE, torch.full(indices_TK.shape, 1 / self.k), indices_TK)
