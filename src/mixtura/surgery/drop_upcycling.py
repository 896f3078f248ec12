"""Drop-upcycling: copies of the dense layer, a part of whose hidden units begins anew, so that experts differ.

    for each expert: r F hidden units are chosen; their rows of gate and up and their columns of down are drawn from
    N(mean, std^2) of the very values they replace, matrix by matrix

Ratio 0 is sparse upcycling, ratio 1 a random layer with matched statistics. The function is not preserved: the model
begins worse and is to end better, since equal copies part slowly.

Paper versus code: the paper re-initializes the same units in all three matrices; the released code draws them anew
for each matrix, so that only (1 - r)^3 of the units stay whole (0.125 at r = 0.5) instead of 1 - r. ``indices``
chooses. The code also permutes the hidden units of each expert, which changes nothing and is left out. Biases are kept.

Reference: Nakamura et al., arXiv:2502.19261.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.core.registry import method
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import ExpertView, view_expert
from mixtura.surgery.conversion import Conversion, RouterInit, check_share, seeded, split_into_mixture


@method("drop-upcycling", role="surgery", paper="arXiv:2502.19261")
def drop_upcycling(
    dense: FeedForwardWeights,
    *,
    copies: int = 4,
    shards: int = 1,
    k: int = 2,
    ratio: float = 0.5,
    indices: Literal["shared", "independent"] = "shared",
    shared: float = 0.0,
    router_init: RouterInit = "normal",
    router_rows_CD: torch.Tensor | None = None,
    seed: int = 0,
) -> Conversion:
    """Make a mixture of partly re-initialized copies.

    Args:
        dense: the layer to copy.
        copies: C.
        shards: G, parts that a copy is cut into.
        k: experts a token; a multiple of G.
        ratio: r, share of the hidden units of each expert that begins anew, in 0 .. 1.
        indices: "shared" takes the same units in gate, up and down; "independent" draws them for each, as the code
            does.
        shared: share of the hidden units that every token passes; they are kept.
        router_init: "normal" (std 0.02) or "uniform" on [0, 1), the code's.
        router_rows_CD: the router's row for each copy, instead of random ones.
        seed: of everything drawn.

    Raises:
        OptionError: on a value outside of these.
    """
    check_share("ratio", ratio)
    if indices not in ("shared", "independent"):
        raise OptionError(f"indices must be 'shared' or 'independent', got {indices!r}")
    if indices == "independent" and 0 < ratio < 1:
        warnings.warn(
            f"indices='independent' leaves (1 - ratio)^3 = {(1 - ratio) ** 3:.3f} of the hidden units whole, "
            f"'shared' {1 - ratio:.3f}",
            MixturaWarning,
            stacklevel=2,
        )
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
    for e in range(copies * shards if ratio else 0):
        _reinitialize(view_expert(mixture.experts, e), ratio, indices == "shared", generator)
    return Conversion(mixture, preserves=ratio == 0)


@torch.no_grad()
def _reinitialize(expert: ExpertView, ratio: float, same: bool, generator: torch.Generator) -> None:
    """Draw a share of the hidden units anew; weights are seen with the hidden unit first."""
    matrices = [m for m in (expert.gate_FD, expert.up_FD, expert.down_DF.T) if m is not None]
    width = len(expert.up_FD)
    units = torch.randperm(width, generator=generator)[: round(ratio * width)]
    for matrix_FD in matrices:
        replaced = matrix_FD[units]
        if replaced.numel():
            drawn = torch.randn(replaced.shape, generator=generator).to(replaced)
            matrix_FD[units] = drawn * replaced.std() + replaced.mean()
        if not same:
            units = torch.randperm(width, generator=generator)[: round(ratio * width)]
