"""Dynamic top-p: a token gets as many experts as its router needs to be sure.

    P = softmax(x W^T);  experts by falling P, kept until their sum exceeds p;  y = sum over the kept  P_i f_i(x)

Weights are the raw probabilities. The routing is ragged: K = E slots (or ``max_k``), those that are not needed stay
empty. p = 0 is top-1 with weight max P, p = 1 the dense mixture. Nothing keeps a router from flattening P to use more
experts but the loss ``dynamic-entropy``; balance is ``load-balancing``.

Paper versus code: only inference was released, with p = 0.4 and 16 experts; there p = 1 can lose a tail expert, since
a sum of float32 exceeds 1 before its end, and P is computed in the model's type. Here p = 1 keeps all, and P is
float32. The coefficient of the entropy, 1e-4, is the paper's.

Reference: Huang et al., arXiv:2403.07652.
"""

from __future__ import annotations

from mixtura.core.registry import method
from mixtura.core.selection import SelectionSpec
from mixtura.nn.routers.base import LinearGate, Router


@method("dynamic-top-p", role="router", paper="arXiv:2403.07652", seeds=("002", "004"))
class DynamicTopPRouter(Router):
    """Router of as many experts as it takes; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        p: probability that the experts of a token exceed together.
        max_k: most experts of a token; None is E.

    Raises:
        OptionError: if p is below 0, or max_k not in 1 .. E.
    """

    def __init__(self, dim: int, num_experts: int, *, p: float = 0.4, max_k: int | None = None) -> None:
        spec = SelectionSpec(k=num_experts if max_k is None else max_k, p=p)
        super().__init__(LinearGate(dim, num_experts), spec, num_experts)
