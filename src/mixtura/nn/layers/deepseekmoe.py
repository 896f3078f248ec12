"""DeepSeekMoE: finer experts, and some that are always on.

    N experts of width h, K chosen  ->  mN experts of width h/m, s of them shared: every token passes them with weight 1
    y = sum_{shared} f(x) + sum_{i in top(mK - s)} w_i f_i(x)
    w = softmax(x W^T) over the mN - s routed experts, in float32

The same expert parameters and the same work a token whatever m is (the router grows as mN D); C(mN, mK) combinations
instead of C(N, K): 16 choose 2 is 120, 64 choose 8 is 4,426,165,368. The shared experts are stored as ONE feed-forward
of width s h/m.

Paper versus code: the released 16B has k = 6 of 64, 2 shared and weights that are not renormalized, and so have we by
default. Its balance loss is attached by an autograd identity and never shows in the logged loss; ours is
``load-balancing``.

Reference: Dai et al., arXiv:2401.06066, eq. 3-11.
"""

from __future__ import annotations

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.mixture import FeedForward, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter


@method("deepseekmoe", role="layer", paper="arXiv:2401.06066", seeds=("000", "002", "004"))
def deepseekmoe(
    dim: int,
    width: int,
    num_experts: int,
    k: int,
    *,
    segments: int = 4,
    shared: int = 1,
    renormalize: float | None = None,
    activation: str = "silu",
    gated: bool = True,
) -> Mixture:
    """Mixture with segmented and shared experts.

    Args:
        dim: D.
        width: h, of an expert before segmentation.
        num_experts: N, before segmentation.
        k: K, chosen before segmentation.
        segments: m, parts that an expert is cut into.
        shared: s, cut experts that every token passes; they count among the mK.
        renormalize: None, or 1 to divide the weights of the routed experts by their sum.
        activation: name of the activation.
        gated: whether experts are gated.

    Raises:
        OptionError: if m does not divide the width, or no expert remains to route among (0 <= s < mK).
    """
    if width % segments:
        raise OptionError(f"segments must divide width {width}, got {segments}")
    if not 0 <= shared < segments * k:
        raise OptionError(f"shared must lie in 0 .. segments * k - 1 = {segments * k - 1}, got {shared}")
    routed, part = segments * num_experts - shared, width // segments
    return Mixture(
        TopKRouter(dim, routed, segments * k - shared, renormalize=renormalize),
        Experts(routed, dim, part, activation=activation, gated=gated),
        FeedForward(dim, shared * part, activation=activation, gated=gated) if shared else None,
    )
