"""What every way from a dense feed-forward to a mixture shares: its result, and how copies and shards are laid out.

C copies, G shards of a copy, E = C G experts, D width, F width of the dense layer. Expert c G + g is shard g of copy c.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mixtura.core.errors import OptionError
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import Experts, view_expert
from mixtura.nn.mixture import FeedForward, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter

RouterInit = Literal["normal", "uniform"]


class Conversion(NamedTuple):
    """A mixture made from a dense layer.

    Attributes:
        mixture: the new layer.
        preserves: whether it promises to compute what the dense layer computed.
    """

    mixture: Mixture
    preserves: bool


def split_into_mixture(
    dense: FeedForwardWeights,
    *,
    copies: int,
    shards: int,
    k: int,
    shared: float,
    router_init: RouterInit,
    router_rows_CD: torch.Tensor | None,
    generator: torch.Generator,
) -> Mixture:
    """Mixture of exact copies, each cut into shards; it computes what the dense layer computes for every router.

    The rows of the router are equal within a copy, so all shards of a copy are chosen together, each with 1 / G of
    the copy's weight. Down projections carry the factor G, which no stock family could hold as a scale; the output bias
    does not, and is counted once since weights sum to 1.

    Args:
        dense: what to copy.
        copies: C.
        shards: G; the routed hidden units must divide by it.
        k: experts a token, a multiple of G.
        shared: share of the hidden units, from the first on, that every token passes.
        router_init: "normal" with std 0.02, or "uniform" on [0, 1).
        router_rows_CD: the router's row for each copy, instead of random ones.
        generator: for the router.

    Raises:
        OptionError: on a value outside of these.
    """
    for name, value in (("copies", copies), ("shards", shards), ("k", k)):
        check_whole(name, value)
    always = round(check_share("shared", shared) * dense.width)
    _check_fit(dense, copies, shards, k, always)
    routed = dense.slice(slice(always, None))
    router = TopKRouter(dense.dim, copies * shards, k, renormalize=1.0)
    gated, bias = dense.gate_FD is not None, dense.down_bias_D is not None
    experts = Experts(
        copies * shards, dense.dim, routed.width // shards, activation=dense.activation, gated=gated, bias=bias
    )
    common = FeedForward(dense.dim, always, activation=dense.activation, gated=gated, bias=bias) if always else None
    mixture = Mixture(router, experts, common).to(dense.up_FD)
    with torch.no_grad():
        rows_CD = _rows(copies, dense.dim, router_init, router_rows_CD, generator)
        router.gate.weight.copy_(rows_CD.repeat_interleave(shards, 0))  # type: ignore[union-attr, operator]
        for e in range(copies * shards):
            width = routed.width // shards
            _fill(experts, e, routed.slice(slice(e % shards * width, (e % shards + 1) * width)), shards)
        if common is not None:
            _fill_shared(common, dense.slice(slice(0, always)))
    return mixture


def check_whole(name: str, value: int) -> None:
    """Raise ``OptionError`` unless an option is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_share(name: str, value: float) -> float:
    """The option, if it is a number in 0 .. 1.

    Raises:
        OptionError: if it is not.
    """
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise OptionError(f"{name} must be a number in 0 .. 1, got {value!r}")
    return value


def seeded(seed: int) -> torch.Generator:
    """Generator of everything that a method draws.

    Raises:
        OptionError: if the seed is no whole number.
    """
    if not isinstance(seed, int):
        raise OptionError(f"seed must be a whole number, got {seed!r}")
    return torch.Generator().manual_seed(seed)


def _check_fit(dense: FeedForwardWeights, copies: int, shards: int, k: int, always: int) -> None:
    if always == dense.width:
        raise OptionError(f"shared must leave some of the {dense.width} hidden units to the experts")
    if (dense.width - always) % shards:
        raise OptionError(f"shards must divide the {dense.width - always} routed hidden units, got {shards}")
    if k % shards or k > copies * shards:
        raise OptionError(
            f"k must be a multiple of shards = {shards}, so that whole copies are chosen, and at most "
            f"copies * shards = {copies * shards}, got {k}"
        )


def _rows(
    copies: int, dim: int, init: RouterInit, rows_CD: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    if rows_CD is not None:
        if tuple(rows_CD.shape) != (copies, dim):
            raise OptionError(f"router_rows_CD must have shape ({copies}, {dim}), got {tuple(rows_CD.shape)}")
        return rows_CD
    if init == "normal":
        return torch.randn(copies, dim, generator=generator) * 0.02
    if init == "uniform":
        return torch.rand(copies, dim, generator=generator)
    raise OptionError(f"router_init must be 'normal' or 'uniform', got {init!r}")


def _fill(experts: Experts, e: int, dense: FeedForwardWeights, shards: int) -> None:
    view = view_expert(experts, e)
    for ours, theirs in zip(view[:5], dense[:5], strict=True):
        if ours is not None:
            ours.copy_(theirs) if theirs is not None else ours.zero_()  # type: ignore[arg-type]
    view.down_DF.copy_(dense.down_DF * shards)
    if view.down_bias_D is not None:
        view.down_bias_D.copy_(dense.down_bias_D)  # type: ignore[arg-type]


def _fill_shared(common: FeedForward, dense: FeedForwardWeights) -> None:
    """The output bias stays with the routed experts, or it would count twice."""
    parts = ((common.gate_proj, dense.gate_FD, dense.gate_bias_F), (common.up_proj, dense.up_FD, dense.up_bias_F))
    for linear, weight, bias in (*parts, (common.down_proj, dense.down_DF, None)):
        if linear is None or weight is None:
            continue
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias) if bias is not None else linear.bias.zero_()
