"""AdaMoE: null experts, so that a token can choose to use fewer experts.

    P = softmax(x [W; N]^T) over E true and m null experts;  indices = top-k of P, k larger than for top-k routing
    weights of the chosen true experts = P divided by their sum;  of the null experts 0, and 0 if none is true

A null expert answers 0 and costs nothing, so a token of the k chosen uses only the true ones; at balance k E / (E + m)
on average, which m sets: E = 8, k = 3, m = 8 is 1.5. A token whose choices are all null gets exactly 0 from the layer.
In a mixture the experts are ``ExpertGroup([Experts(E, ...), ZeroExperts(m, ...)])``; ``with_null_experts`` adds them to
a mixture that exists.

The division cancels what a null expert has in the softmax, so its row of the gate gets no gradient from the output:
``null-balance``, which asks the null experts to do their share together, not each alone, is what trains it (coefficient
0.001 in the released run).

Paper versus code: one released experiment counts null experts apart by ids that are written into the code, and another
pools them over a wrong axis, which does nothing; pooled here as in the paper.

Reference: Zeng et al., arXiv:2406.13233.

T tokens, D width, E true experts, m null experts.
"""

from __future__ import annotations

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.registry import method
from mixtura.core.selection import SelectionSpec
from mixtura.nn.experts.forms import ZeroExperts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.base import LinearGate, Router, warn_of_a_constant_weight
from mixtura.nn.routers.topk_softmax import TopKRouter


@method("adamoe", role="router", paper="arXiv:2406.13233", seeds=("000",))
class AdaMoERouter(Router):
    """Top-k router over true and null experts; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E, true experts. The router's ``num_experts`` is E + m.
        null_experts: m.
        k: slots a token, about twice those of a router without null experts.

    Raises:
        OptionError: if null_experts is below 0, or k not in 1 .. E + m.
    """

    def __init__(self, dim: int, num_experts: int, null_experts: int, k: int = 4) -> None:
        if num_experts < 1 or null_experts < 0:
            raise OptionError(
                f"num_experts must be at least 1 and null_experts at least 0, got {num_experts} and {null_experts}"
            )
        spec = SelectionSpec(k=k, renormalize=1.0, null_experts=null_experts)
        super().__init__(LinearGate(dim, num_experts + null_experts), spec, num_experts + null_experts)
        warn_of_a_constant_weight(spec, self.num_experts)


@torch.no_grad()
def with_null_experts(mixture: Mixture, null_experts: int, k: int, *, std: float = 0.02, seed: int = 0) -> Mixture:
    """A mixture with null experts beside its own, whose weights it shares.

    Args:
        mixture: with a router "topk-softmax" that divides the weights by their sum, as AdaMoE does.
        null_experts: m.
        k: slots a token from now on.
        std: deviation of the null experts' rows of the gate.
        seed: of these rows.

    Returns:
        A mixture with the rows of the old gate; with as many true experts chosen it computes the same.

    Raises:
        NotExpressibleError: if the router is another.
        OptionError: if null_experts is below 1, or k not in 1 .. E + m.
    """
    old = mixture.router
    if not isinstance(old, TopKRouter) or old.spec != SelectionSpec(k=old.slots, renormalize=1.0):
        raise NotExpressibleError("null experts are added to a router 'topk-softmax' with renormalize=1 and no scale")
    if type(old.gate) is not LinearGate or old.gate.bias is not None:
        raise NotExpressibleError("null experts are added to a linear gate without bias and noise")
    if null_experts < 1:
        raise OptionError(f"null_experts must be at least 1, got {null_experts}")
    rows_ED = old.gate.weight
    D = rows_ED.shape[1]
    router = AdaMoERouter(D, old.num_experts, null_experts, k).to(rows_ED)
    drawn_mD = torch.randn(null_experts, D, generator=torch.Generator().manual_seed(seed), device="cpu") * std
    router.gate.weight.copy_(torch.cat([rows_ED, drawn_mD.to(rows_ED)]))  # type: ignore[operator]
    experts = mixture.experts
    forms: list[nn.Module] = [*experts.forms] if isinstance(experts, ExpertGroup) else [experts]
    group = ExpertGroup([*forms, ZeroExperts(null_experts, D)])
    return Mixture(router, group, mixture.shared, layer=mixture.layer).train(mixture.training)
