"""Top-k routing: each token goes to its k best experts.

    L = x W^T in float32 (T, E);  weights and indices (T, K) = select(L, spec)

Five switches give every published variant: ``score`` (softmax, sigmoid, relu, none), ``order`` (score before or after
choosing), ``renormalize`` (none, by the sum, by a p-norm), ``scale`` (after renormalizing) and ``weight_on`` (the
expert's output, or its input as in Llama 4).

    Switch    k=1, weight = p_max                       renormalize=None
    GShard, Mixtral    k=2, divided by their sum         renormalize=1
    Granite, gpt-oss   softmax over the chosen logits    order="topk-score"   (equal to Mixtral's)
    DeepSeek-V3        sigmoid, divided by the sum, times 2.5

Paper versus code: Shazeer's noise and capacities (tokens dropped) are no part of this router; Mixtral and everyone
after it drops nothing. A top-1 gate that is renormalized has weight 1 whatever its logits are: it gets no gradient, and
says so.

Reference: Shazeer et al., arXiv:1701.06538; Lepikhin et al., arXiv:2006.16668; Fedus et al., arXiv:2101.03961; Jiang et
al., arXiv:2401.04088.
"""

from __future__ import annotations

import warnings

from mixtura.core.errors import MixturaWarning
from mixtura.core.registry import method
from mixtura.core.selection import Order, Score, SelectionSpec, WeightOn
from mixtura.nn.routers.base import LinearGate, Router


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
    ) -> None:
        spec = SelectionSpec(k=k, score=score, order=order, renormalize=renormalize, scale=scale, weight_on=weight_on)
        super().__init__(LinearGate(dim, num_experts, bias=bias), spec, num_experts)
        if k == 1 and num_experts > 1 and (renormalize is not None or (order, score) == ("topk-score", "softmax")):
            warnings.warn(
                "a top-1 gate whose weight is renormalized is constant 1 and gets no gradient from the loss; "
                "use renormalize=None or k >= 2",
                MixturaWarning,
                stacklevel=3,
            )
