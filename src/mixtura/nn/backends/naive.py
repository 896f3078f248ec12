"""The oracle: y = sum_e g_e(x) f_e(x), every expert on every token.

T tokens, D width, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def naive_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts as the formula says; empty slots fall into a column that is not read."""
    E = int(experts.num_experts)  # type: ignore[arg-type]
    gate_TE = weights_TK.new_zeros(len(hidden_TD), E + 1).scatter_add(1, indices_TK, weights_TK)
    out_TD = torch.zeros_like(hidden_TD)
    for e in range(E):
        out_TD = out_TD + (gate_TE[:, e, None] * one_expert(experts, e, hidden_TD)).to(hidden_TD.dtype)
    return out_TD


def one_expert(experts: nn.Module, e: int, hidden_SD: torch.Tensor) -> torch.Tensor:
    """f_e of S tokens, for a module in any layout of transformers."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_SC = _linear(experts, first, e, hidden_SD)
    inner_SF = experts._apply_gate(inner_SC) if experts.has_gate else experts.act_fn(inner_SC)  # type: ignore[operator]
    out_SD = _linear(experts, "down_proj", e, inner_SF)
    return experts.post_expert_norm(out_SD) if experts.has_post_expert_norm else out_SD  # type: ignore[operator, no-any-return]


def _linear(experts: nn.Module, name: str, e: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[e]
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)
