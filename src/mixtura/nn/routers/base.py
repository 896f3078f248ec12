"""What every router is: a gate that makes logits, and a ``SelectionSpec``.

T tokens, D width, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.routing import Routing, keep
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.state import current_state


class LinearGate(nn.Module):
    """logits = x W^T (+ b), in float32 also under autocast and in models of lower precision; float64 stays.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        bias: whether the logits have a bias (gpt-oss has one).
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from N(0, std^2); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E) in float32, or in float64 for tokens in float64."""
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.linear(hidden_TD.to(wide), self.weight.to(wide), bias)


class Router(nn.Module):
    """A gate and a selection spec; seam 1 of the library.

    Args:
        gate: module from hidden_TD to logits_TE.
        spec: how logits become a routing.
        num_experts: E.

    Raises:
        OptionError: if the spec cannot choose among that many experts.
    """

    def __init__(self, gate: nn.Module, spec: SelectionSpec, num_experts: int) -> None:
        super().__init__()
        spec.check_experts(num_experts)
        self.gate = gate
        self.spec = spec
        self.num_experts = num_experts

    @property
    def selection_bias_E(self) -> torch.Tensor | None:
        """Bias that chooses and never weighs; none unless a router overrides this."""
        return None

    def end_step(self, counts_E: torch.Tensor) -> None:
        """Called once after every optimizer step; nothing to do unless a router balances itself.

        Args:
            counts_E: slots that each expert got in the whole step: all micro-batches, all processes, padding not
                counted.
        """

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens; padding, known from the current ``RouterState``, gets empty slots.

        Raises:
            ShapeError: if the state's mask is of another number of tokens.
        """
        routing = select(self.gate(hidden_TD), self.spec, self.selection_bias_E)
        state = current_state()
        return routing if state is None or state.mask_T is None else keep(routing, state.mask_T)
