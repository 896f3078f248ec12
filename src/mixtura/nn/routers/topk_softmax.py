"""Top-k routing: each token goes to its k best experts.

    L = x W^T in float32 (T, E);  weights and indices (T, K) = select(L, spec)

Five switches give every published variant: ``score`` (softmax, sigmoid, relu, none), ``order`` (score before or after
choosing), ``renormalize`` (none, by the sum, by a p-norm), ``scale`` (after renormalizing) and ``weight_on`` (the
expert's output, or its input as in Llama 4). A sixth, ``noise``, explores in training and is off in evaluation:

    learned   L = x W^T + n softplus(x N^T),  n ~ N(0, 1) for each token and expert; W and N start at 0    (Shazeer)
    jitter    L = (u x) W^T,  u ~ U(1 - eps, 1 + eps) for each token and coordinate                  (Switch, eps 0.01)

    Shazeer   noise="learned", order="topk-score"        balance: ``importance-balance``
    Switch    k=1, weight = p_max                        renormalize=None, noise="jitter"
    GShard, Mixtral    k=2, divided by their sum         renormalize=1
    Granite, gpt-oss   softmax over the chosen logits    order="topk-score"   (equal to Mixtral's)
    DeepSeek-V3        sigmoid, divided by the sum, times 2.5

Paper versus code: capacities (tokens dropped) are no part of this router; Mixtral and everyone after it drops nothing.
Nor is GShard's second expert that is dropped at random, nor Shazeer's smooth load, which needs the logits without noise
and its deviation beside what a routing holds. A top-1 gate that is renormalized has weight 1 whatever its logits are:
it gets no gradient, and says so.

Reference: Shazeer et al., arXiv:1701.06538, eq. 3-5; Lepikhin et al., arXiv:2006.16668; Fedus et al., arXiv:2101.03961;
Jiang et al., arXiv:2401.04088.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.core.selection import Order, Score, SelectionSpec, WeightOn
from mixtura.nn.routers.base import LinearGate, Router, warn_of_a_constant_weight

Noise = Literal["none", "learned", "jitter"]


class NoisyGate(LinearGate):
    """Linear gate with Gaussian noise in training, whose deviation depends on the token; both start at 0.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        bias: whether the logits have a bias.
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__(dim, num_experts, bias=bias)
        self.deviation = LinearGate(dim, num_experts)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.deviation.weight)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E), with noise in training."""
        logits_TE = super().forward(hidden_TD)
        if not self.training:
            return logits_TE
        return logits_TE + torch.randn_like(logits_TE) * F.softplus(self.deviation(hidden_TD))


class JitterGate(LinearGate):
    """Linear gate that sees each coordinate of a token times a random number near 1 in training.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        bias: whether the logits have a bias.
        jitter: eps; the numbers are uniform on 1 - eps .. 1 + eps.
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False, jitter: float = 0.01) -> None:
        super().__init__(dim, num_experts, bias=bias)
        self.jitter = jitter

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E), of a jittered token in training."""
        if self.training:
            hidden_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
            hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().forward(hidden_TD)


@method("topk-softmax", role="router", paper="arXiv:2101.03961")
class TopKRouter(Router):
    """Top-k router with a linear gate; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        k: experts a token.
        score: function of the logits that gives the scores.
        order: score all and choose, or choose and score those.
        renormalize: None, or the order of the norm that divides the weights (1: their sum).
        scale: factor on the weights.
        weight_on: whether a weight multiplies its expert's output or input.
        bias: whether the gate has a bias.
        noise: of the gate in training.
        jitter: eps of the noise "jitter".

    Raises:
        OptionError: on a value outside of what is accepted, or k > num_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        score: Score = "softmax",
        order: Order = "score-topk",
        renormalize: float | None = 1.0,
        scale: float = 1.0,
        weight_on: WeightOn = "output",
        bias: bool = False,
        noise: Noise = "none",
        jitter: float = 0.01,
    ) -> None:
        spec = SelectionSpec(k=k, score=score, order=order, renormalize=renormalize, scale=scale, weight_on=weight_on)
        super().__init__(_gate(dim, num_experts, bias, noise, jitter), spec, num_experts)
        warn_of_a_constant_weight(spec, num_experts)


def _gate(dim: int, num_experts: int, bias: bool, noise: Noise, jitter: float) -> LinearGate:
    if noise not in get_args(Noise):
        raise OptionError(f"noise must be one of 'none', 'learned', 'jitter', got {noise!r}")
    if not 0 <= jitter < 1:
        raise OptionError(f"jitter must lie in 0 .. 1, got {jitter}")
    if noise == "learned":
        return NoisyGate(dim, num_experts, bias=bias)
    if noise == "jitter":
        return JitterGate(dim, num_experts, bias=bias, jitter=jitter)
    return LinearGate(dim, num_experts, bias=bias)
