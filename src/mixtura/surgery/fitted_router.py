"""Router rows that begin as a classifier: copy c of an upcycled layer starts with the tokens of kind c.

    rows = (X^T X / T + ridge * mean diagonal * I)^-1 X^T (Y - mean Y) / T,   scaled to logits of a given deviation

X (T, D) are the states that enter the feed-forward, Y (T, C) their kinds, one-hot: the kind of text that a token comes
from, or its cluster among the states (k-means on centered directions, begun as k-means++). A linear probe by ridge
regression, one solve a layer and no training. Copies then part from the first step on, where random routers must find a
partition while they learn.

C kinds and copies, D width, T tokens, N blocks of L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mixtura.core.errors import OptionError


@torch.no_grad()
def fit_router_rows(
    model: Any,
    blocks: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    clusters: int | None = None,
    ridge: float = 1e-2,
    sharpness: float = 10.0,
    seed: int = 0,
    batch_size: int = 4,
) -> dict[int, torch.Tensor]:
    """Rows of a router for each layer, to be given to ``upcycle`` as ``router_rows``.

    Args:
        model: dense causal language model.
        blocks: token ids (N, L) by kind of text; the order of the kinds is that of the copies.
        layers: numbers of decoder layers.
        clusters: C, to part states by clusters of their own; None parts them by kind of text.
        ridge: regularization, relative to the mean variance of the states.
        sharpness: standard deviation of the logits.
        seed: of the clusters.
        batch_size: blocks of a forward pass.

    Returns:
        By layer, rows (C, D) in float32.

    Raises:
        OptionError: if there are fewer than two kinds or clusters, or a number is not above 0.
    """
    copies = len(blocks) if clusters is None else clusters
    if copies < 2 or ridge <= 0 or sharpness <= 0:
        raise OptionError(
            "two or more kinds or clusters, and ridge and sharpness above 0, are needed, "
            f"got {copies}, {ridge} and {sharpness}"
        )
    kinds = torch.cat([torch.full((ids_NL.numel(),), c) for c, ids_NL in enumerate(blocks.values())])
    rows = {}
    for i, states_TD in _entering(model, blocks, layers, batch_size).items():
        kinds_T = kinds if clusters is None else _clusters(states_TD, clusters, torch.Generator().manual_seed(seed))
        rows[i] = _ridge(states_TD, F.one_hot(kinds_T, copies).to(states_TD), ridge, sharpness)
    return rows


def _entering(
    model: Any, blocks: Mapping[str, torch.Tensor], layers: Sequence[int], batch_size: int
) -> dict[int, torch.Tensor]:
    """States (T, D) that enter the feed-forward of each layer, in the order of the blocks."""
    from mixtura.hf import feed_forward_sites

    found: dict[int, list[torch.Tensor]] = {i: [] for i in layers}

    def keep(number: int) -> Any:
        return lambda module, args: found[number].append(args[0].flatten(0, -2).float())

    sites = feed_forward_sites(model)
    entries = {i: getattr(sites[i].parent, sites[i].name) for i in layers}
    handles = [entry.register_forward_pre_hook(keep(i)) for i, entry in entries.items()]
    try:
        for ids_NL in blocks.values():
            for ids_BL in ids_NL.split(batch_size):
                model.eval()(ids_BL.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {i: torch.cat(states) for i, states in found.items()}


def _ridge(states_TD: torch.Tensor, kinds_TC: torch.Tensor, ridge: float, sharpness: float) -> torch.Tensor:
    T = len(states_TD)
    gram_DD = states_TD.T @ states_TD / T
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
    rows_CD = torch.linalg.solve(gram_DD, states_TD.T @ (kinds_TC - kinds_TC.mean(0)) / T).T
    return rows_CD * (sharpness / (states_TD @ rows_CD.T).std(correction=0))


def _clusters(states_TD: torch.Tensor, number: int, generator: torch.Generator, steps: int = 15) -> torch.Tensor:
    """Cluster of each state, by its direction from the mean."""
    directions_TD = F.normalize(states_TD - states_TD.mean(0), dim=-1).cpu()
    first = torch.randint(len(directions_TD), (1,), generator=generator)
    centers_CD = directions_TD[first]
    for _ in range(number - 1):
        distance_T = (2 - 2 * (directions_TD @ centers_CD.T).amax(1)).clamp(min=0)
        centers_CD = torch.cat([centers_CD, directions_TD[torch.multinomial(distance_T, 1, generator=generator)]])
    for _ in range(steps):
        nearest_T = (directions_TD @ centers_CD.T).argmax(1)
        for c in range(number):
            if (nearest_T == c).any():
                centers_CD[c] = F.normalize(directions_TD[nearest_T == c].mean(0), dim=0)
    return (directions_TD @ centers_CD.T).argmax(1).to(states_TD.device)
