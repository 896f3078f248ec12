"""MoE++: beside feed-forward experts some that compute nothing, and a router that remembers the layer before.

    experts   N feed-forward, then constant, copy, zero experts (their forms: ``mixtura.nn.experts.forms``)
    router    ``gating-residual`` over all of them, top-2; zero experts weigh 0, the others are divided by their sum

A token that needs less work chooses less: {copy, zero} returns it as it is, {zero, zero} returns 0, and with one zero
expert among two the other's weight is exactly 1. Balance: ``heterogeneous-balance``, by which experts without
computation may do more (``zero_computation`` = constant + copy + zero).

Paper versus code: the released layer multiplies its input by k in place (a copy expert then returns 2 x and the
caller's tensor is changed); here, as with its switch ``moe_feature_no_mul_topk``, nothing is multiplied. No expert has
a capacity, so nothing is dropped: the paper's are g tau T k / (tau N + Z) slots for each of the N feed-forward experts
and g T k / (tau N + Z) for each of the Z others, g = 1.1, in training. The paper has N / 4 - 2 constant experts, one at
least.

Reference: Jin et al., arXiv:2410.07348.
"""

from __future__ import annotations

from torch import nn

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.experts.forms import ConstantExperts, CopyExperts, ZeroExperts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.gating_residual import Gate, GatingResidualRouter


@method("moe-plus-plus", role="layer", paper="arXiv:2410.07348", seeds=("004",))
def moe_plus_plus(
    dim: int,
    width: int,
    num_experts: int,
    k: int = 2,
    *,
    constant: int = 2,
    copy: int = 1,
    zero: int = 1,
    gate: Gate = "two-layer",
    activation: str = "silu",
    gated: bool = True,
) -> Mixture:
    """Mixture of feed-forward experts and experts without computation.

    Args:
        dim: D.
        width: of a feed-forward expert.
        num_experts: N, feed-forward experts.
        k: experts a token.
        constant: number of constant experts.
        copy: number of copy experts.
        zero: number of zero experts.
        gate: of the router.
        activation: name of the activation.
        gated: whether feed-forward experts are gated.

    Raises:
        OptionError: on a number below 0, or k above that of all experts.
    """
    for name, number in (("constant", constant), ("copy", copy), ("zero", zero)):
        if number < 0:
            raise OptionError(f"{name} must be at least 0, got {number}")
    forms: list[nn.Module] = [Experts(num_experts, dim, width, activation=activation, gated=gated)]
    kinds = ((ConstantExperts, constant), (CopyExperts, copy), (ZeroExperts, zero))
    forms += [kind(number, dim) for kind, number in kinds if number]
    router = GatingResidualRouter(dim, num_experts + constant + copy, k, null_experts=zero, gate=gate)
    return Mixture(router, ExpertGroup(forms) if len(forms) > 1 else forms[0])
