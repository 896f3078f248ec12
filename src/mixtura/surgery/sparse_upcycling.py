"""Sparse upcycling: experts that begin as copies of the dense feed-forward layer.

    expert c G + g = shard g of copy c of the dense layer,  y = sum over k chosen experts of w_i f_i(x),  sum_i w_i = 1

C copies, each cut into G shards of the hidden units; with k = G a token does exactly the dense layer's work, with
G = 1 and k = 2 twice that. Since copies are equal and weights sum to 1, the new model computes what the dense one
computed, for every router: y = sum_i w_i f(x) = f(x). With shards, the rows of the router are equal within a copy,
whole copies are chosen, and down projections carry the factor G. In training the rows of a copy drift apart, and shards
of different copies meet.

What the gate learns at first: equal copies answer alike, so between copies its gradient is 0 until they have parted by
what is routed to them; ``noise`` parts them at once and gives up exactness. Between the shards of a copy it is not 0
but sums to 0: it parts the rows of the copy and moves the copy as a whole nowhere. With k = 1 a weight is always 1 and
never has a gradient.

Paper versus code: the paper renormalizes for vision only; without it the output shrinks to the sum of the top-k
probabilities. Here weights always sum to 1. Shards are the virtual groups of later work (arXiv:2410.07524).

Reference: Komatsuzaki et al., arXiv:2212.05055.
"""

from __future__ import annotations

import math

import torch

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.mixture import Mixture
from mixtura.surgery.conversion import Conversion, RouterInit, seeded, split_into_mixture


@method("sparse-upcycling", role="surgery", paper="arXiv:2212.05055")
def sparse_upcycling(
    dense: FeedForwardWeights,
    *,
    copies: int = 4,
    shards: int = 2,
    k: int = 2,
    noise: float = 0.0,
    shared: float = 0.0,
    router_init: RouterInit = "normal",
    router_rows_CD: torch.Tensor | None = None,
    seed: int = 0,
) -> Conversion:
    """Make a mixture of copies.

    Args:
        dense: the layer to copy.
        copies: C.
        shards: G, parts that a copy is cut into.
        k: experts a token; a multiple of G. k = G has the dense layer's active size.
        noise: standard deviation of what is added to each weight of each expert, relative to that of its matrix.
        shared: share of the hidden units that every token passes.
        router_init: "normal" (std 0.02) or "uniform" on [0, 1).
        router_rows_CD: the router's row for each copy, instead of random ones.
        seed: of noise and router.

    Raises:
        OptionError: on a value outside of these.
    """
    if not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise OptionError(f"noise must be a number of at least 0, got {noise!r}")
    generator = seeded(seed)
    mixture = split_into_mixture(
        dense,
        copies=copies,
        shards=shards,
        k=k,
        shared=shared,
        router_init=router_init,
        router_rows_CD=router_rows_CD,
        generator=generator,
    )
    if noise:
        _add_noise(mixture, noise, generator)
    return Conversion(mixture, preserves=noise == 0)


@torch.no_grad()
def _add_noise(mixture: Mixture, noise: float, generator: torch.Generator) -> None:
    for e in range(mixture.experts.num_experts):  # type: ignore[arg-type]
        for weights in view_expert(mixture.experts, e):
            if weights is not None:
                drawn = torch.randn(weights.shape, generator=generator).to(weights)
                weights.add_(drawn, alpha=noise * float(weights.std(correction=0)))
