"""The oracle: y_t = sum_k w_tk f_{i_tk}(x_t), expert by expert.

T tokens, D width, E experts, K slots a token, S slots of one expert, F expert width, C = 2F gated or F plain.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def naive_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts as the formula says, one after the other."""
    out_TD = torch.zeros_like(hidden_TD)
    for e in range(int(experts.num_experts)):  # type: ignore[arg-type]
        token_S, slot_S = (indices_TK == e).nonzero(as_tuple=True)
        out_SD = one_expert(experts, e, hidden_TD[token_S]) * weights_TK[token_S, slot_S, None]
        out_TD = out_TD.index_add(0, token_S, out_SD.to(hidden_TD.dtype))
    return out_TD


def one_expert(experts: nn.Module, e: int, hidden_SD: torch.Tensor) -> torch.Tensor:
    """f_e of S tokens, for a module in any layout of transformers."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_SC = _linear(experts, first, e, hidden_SD)
    inner_SF = experts._apply_gate(inner_SC) if experts.has_gate else experts.act_fn(inner_SC)  # type: ignore[operator]
    out_SD = _linear(experts, "down_proj", e, inner_SF)
    return experts.post_expert_norm(out_SD) if experts.has_post_expert_norm else out_SD  # type: ignore[operator]


def _linear(experts: nn.Module, name: str, e: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[e]
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)
