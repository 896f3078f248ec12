"""Expert choice: each expert takes its best tokens, so that all experts have equally much to do.

    S = softmax(x W^T) over the experts (T, E);  expert e takes the C tokens of a group with the largest S_te
    C = round(c n / E), at least 1, of the n real tokens of the group; all n if there are no more
    y_t = sum over the experts that took t  S_te f_e(x_t)

Weights are the raw probabilities. A token is taken by 0 .. E experts, so the routing has K = E slots, slot e being
expert e or empty; a token that nobody takes passes by the residual connection. The load is even by construction and
needs no balance loss. Ties go to the token that comes first. C is rounded half up.

A group is one sequence (rows of the current ``RouterState``; outside of a model all tokens are one), or the whole
batch as in the paper. Whether a token is taken depends on the tokens after it: the method is not causal, and a decoder
trained with it meets another router in generation, where each new token is alone in its group and all experts take it.

Reference: Zhou et al., arXiv:2202.09368.

T tokens in B groups of Q, D width, E experts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mixtura.core.arrays import where
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.registry import method
from mixtura.core.routing import Routing
from mixtura.nn.routers.base import BaseRouter, LinearGate, without_padding
from mixtura.nn.state import current_state

Group = Literal["sequence", "batch"]


@method("expert-choice", role="router", paper="arXiv:2202.09368", causal=False)
class ExpertChoiceRouter(BaseRouter):
    """Experts choose tokens; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        capacity_factor: c, mean number of experts a token.
        group: the tokens among which an expert chooses: those of a "sequence" or of the "batch".

    Raises:
        OptionError: if capacity_factor is not above 0, or the group is another.
    """

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float = 2.0, group: Group = "sequence") -> None:
        super().__init__(num_experts)
        if not capacity_factor > 0:
            raise OptionError(f"capacity_factor must be above 0, got {capacity_factor}")
        if group not in get_args(Group):
            raise OptionError(f"group must be one of 'sequence', 'batch', got {group!r}")
        self.gate = LinearGate(dim, num_experts)
        self.capacity_factor, self.group = capacity_factor, group

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens; padding is taken by nobody.

        Raises:
            ShapeError: if the state's mask is of another number of tokens, or its rows do not divide it.
        """
        logits_TE = self.gate(hidden_TD)
        every_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        offered = without_padding(Routing(logits_TE, logits_TE.softmax(-1), every_TE))
        taken_TE = self._taken(offered)
        return Routing(
            logits_TE, where(taken_TE, offered.weights_TK, 0.0), where(taken_TE, offered.indices_TK, self.num_experts)
        )

    @torch.no_grad()
    def _taken(self, offered: Routing) -> torch.Tensor:
        """Which expert takes which token (T, E), of those whose slots are not empty."""
        real_TE = offered.indices_TK < self.num_experts
        B = self._groups(len(real_TE))
        real_BQE = real_TE.view(B, -1, self.num_experts) if len(real_TE) else real_TE[None]
        n_B11 = real_BQE[..., :1].sum(1, keepdim=True)
        C_B11 = (n_B11 * (self.capacity_factor / self.num_experts) + 0.5).floor().clamp(min=1)
        # below every probability, those that underflowed included
        scores_BQE = offered.weights_TK.view_as(real_BQE).masked_fill(~real_BQE, -1.0)
        order_BQE = scores_BQE.argsort(dim=1, descending=True, stable=True)
        taken_BQE: torch.Tensor = order_BQE.argsort(dim=1) < C_B11
        return taken_BQE.view_as(real_TE)

    def _groups(self, T: int) -> int:
        state = current_state()
        B = 1 if state is None or self.group == "batch" else state.rows
        if T and T % B:
            raise ShapeError(f"rows of the state must divide its {T} tokens, got {B}")
        return B
