"""Gating residual: a router that knows what the layer before it thought of the token.

    L_j = G_j(x) + L_(j-1) R_j^T        L_0 = 0,  R (E, E) without bias;  weights and indices = select(L_j)
    G(x) = W_2 tanh(W_1 x),  W_1 (8E, D), W_2 (E, 8E), no biases, float32        or linear, W x

L_(j-1) are the logits of the mixture before it in the same forward call, their own residual included; it must choose
among as many experts. They are found on the tape of the current ``RouterState``, so the gradient goes on to the earlier
routers; outside of a model, and in the first mixture, the residual is 0. It runs over depth, not over positions, and
is causal.

``null_experts`` are experts that can be chosen and weigh 0, as the zero experts of MoE++.

Paper versus code: the paper's gate is linear, the released default has two layers, and so have we. R starts as any
other gate of ours, N(0, 0.02^2), near no residual.

Reference: Jin et al. (MoE++), arXiv:2410.07348.

T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.core.selection import SelectionSpec
from mixtura.nn.routers.base import LinearGate, Router, warn_of_a_constant_weight
from mixtura.nn.state import current_state

Gate = Literal["two-layer", "linear"]


class ResidualGate(nn.Module):
    """Logits of a token, and a linear function of those that the mixture before had for it.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        gate: what makes logits of the token.

    Raises:
        OptionError: for another gate.
    """

    def __init__(self, dim: int, num_experts: int, gate: Gate = "two-layer") -> None:
        super().__init__()
        if gate not in get_args(Gate):
            raise OptionError(f"gate must be one of 'two-layer', 'linear', got {gate!r}")
        inner = 8 * num_experts
        self.hidden = LinearGate(dim, inner) if gate == "two-layer" else None
        self.token = LinearGate(dim if self.hidden is None else inner, num_experts)
        self.residual = LinearGate(num_experts, num_experts)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E) in float32, or in float64 for tokens in float64.

        Raises:
            OptionError: if the mixture before chose among another number of experts, or has no logits.
        """
        logits_TE = self.token(hidden_TD if self.hidden is None else self.hidden(hidden_TD).tanh())
        # zeros rather than nothing: every parameter has a gradient on every rank, as data parallel training asks for
        before_TE = _logits_before(logits_TE)
        before_TE = torch.zeros_like(logits_TE) if before_TE is None else before_TE
        return logits_TE + self.residual(before_TE)  # type: ignore[no-any-return]


def _logits_before(logits_TE: torch.Tensor) -> torch.Tensor | None:
    """Logits of the mixture before the one that is deciding; None for the first."""
    state = current_state()
    before = None if state is None else state.tape.before(state.layer)
    if before is None:
        return None
    if before.logits_TE.shape != logits_TE.shape:
        raise OptionError(
            f"gating-residual adds the logits of the mixture before it, so both need as many experts: layer "
            f"{state.layer!r} has {logits_TE.shape[-1]}, the one before {before.num_experts}"  # type: ignore[union-attr]
        )
    if before.logits_TE.isnan().all() and before.logits_TE.numel():
        raise OptionError("gating-residual adds the logits of the mixture before it, but that one gives none")
    before_TE: torch.Tensor = before.logits_TE.to(logits_TE)
    return before_TE


@method("gating-residual", role="router", paper="arXiv:2410.07348", seeds=("004",))
class GatingResidualRouter(Router):
    """Top-k router with a residual over depth; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: experts that weigh something. The router's ``num_experts`` has the null experts too.
        k: slots a token.
        null_experts: experts, the last ones, that weigh 0.
        gate: what makes logits of the token.
        renormalize: None, or the order of the norm that divides the weights (1: their sum).

    Raises:
        OptionError: on a value outside of what is accepted, or k > num_experts + null_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        null_experts: int = 0,
        gate: Gate = "two-layer",
        renormalize: float | None = 1.0,
    ) -> None:
        E = num_experts + null_experts
        spec = SelectionSpec(k=k, renormalize=renormalize, null_experts=null_experts)
        super().__init__(ResidualGate(dim, E, gate), spec, E)
        warn_of_a_constant_weight(spec, E)
