"""Experts without a feed-forward: zero, copy and constant.

    zero      f(x) = 0
    copy      f(x) = x
    constant  f(x) = a_1 x + a_2 v,  (a_1, a_2) = softmax(W x),  v and W learned

They cost nothing (a constant expert 2 D), so a token that needs less work can choose less. Each has indices of its own
in a group; an empty slot means no choice and is none of them.

Reference: Jin et al. (MoE++), arXiv:2410.07348, eq. 4-6; Zeng et al. (AdaMoE), arXiv:2406.13233, for null experts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.registry import method


@method("zero", role="experts", paper="arXiv:2410.07348")
class ZeroExperts(nn.Module):
    """E experts that answer 0.

    Args:
        num_experts: E.
        dim: D; unused, every form has it.
    """

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_TD)


@method("copy", role="experts", paper="arXiv:2410.07348")
class CopyExperts(nn.Module):
    """E experts that answer their input.

    Args:
        num_experts: E.
        dim: D; unused, every form has it.
    """

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """x times the sum of its weights."""
        filled_TK = indices_TK < self.num_experts
        return hidden_TD * weights_TK.masked_fill(~filled_TK, 0).sum(-1, keepdim=True).to(hidden_TD.dtype)


@method("constant", role="experts", paper="arXiv:2410.07348")
class ConstantExperts(nn.Module):
    """E experts that mix their input with a learned vector.

    Args:
        num_experts: E.
        dim: D.
    """

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim
        self.vector = nn.Parameter(torch.empty(num_experts, dim))
        self.mixer = nn.Parameter(torch.empty(num_experts, 2, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both from N(0, std^2)."""
        nn.init.normal_(self.vector, std=std)
        nn.init.normal_(self.mixer, std=std)

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """sum over slots of w (a_1 x + a_2 v)."""
        empty_TK = indices_TK >= self.num_experts
        local_TK = indices_TK.masked_fill(empty_TK, 0)
        share_TE2 = torch.einsum("td,ecd->tec", hidden_TD, self.mixer.to(hidden_TD.dtype)).softmax(-1)
        share_TK2 = share_TE2.gather(1, local_TK[..., None].expand(-1, -1, 2))
        share_TK2 = share_TK2 * weights_TK.masked_fill(empty_TK, 0)[..., None].to(hidden_TD.dtype)
        onto_x_T1 = share_TK2[..., 0].sum(-1, keepdim=True)
        vectors_TKD = F.embedding(local_TK, self.vector.to(hidden_TD.dtype))
        return onto_x_T1 * hidden_TD + torch.einsum("tk,tkd->td", share_TK2[..., 1], vectors_TKD)
