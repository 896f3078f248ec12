"""Router rows that begin as a classifier of text: copy c of an upcycled layer starts with the tokens of kind c.

    rows = (X^T X / T + ridge * mean diagonal * I)^-1 X^T (Y - mean Y) / T,   scaled to logits of a given deviation

X (T, D) are the states that enter the feed-forward, Y (T, C) the kinds of the texts they come from, one-hot: a linear
probe by ridge regression, one solve a layer and no training. Copies then part by the kind of text from the first step
on, where random routers must find a partition while they learn.

C kinds and copies, D width, T tokens, N blocks of L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import OptionError


@torch.no_grad()
def fit_router_rows(
    model: Any,
    blocks: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    ridge: float = 1e-2,
    sharpness: float = 10.0,
    batch_size: int = 4,
) -> dict[int, torch.Tensor]:
    """Rows of a router for each layer, to be given to ``upcycle`` as ``router_rows``.

    Args:
        model: dense causal language model.
        blocks: token ids (N, L) by kind of text; the order of the kinds is that of the copies.
        layers: numbers of decoder layers.
        ridge: regularization, relative to the mean variance of the states.
        sharpness: standard deviation of the logits.
        batch_size: blocks of a forward pass.

    Returns:
        By layer, rows (C, D) in float32.

    Raises:
        OptionError: if there are fewer than two kinds, or a number is not above 0.
    """
    if len(blocks) < 2 or ridge <= 0 or sharpness <= 0:
        raise OptionError(
            "two or more kinds of text, and ridge and sharpness above 0, are needed, "
            f"got {len(blocks)}, {ridge} and {sharpness}"
        )
    gram: dict[int, torch.Tensor] = {}
    moment: dict[int, torch.Tensor] = {}
    counts_C = torch.zeros(len(blocks))
    for c, ids_NL in enumerate(blocks.values()):
        counts_C[c] = ids_NL.numel()
        for ids_BL in ids_NL.split(batch_size):
            for i, states_TD in _entering(model, ids_BL, layers).items():
                gram[i] = gram.get(i, 0) + states_TD.T @ states_TD
                moment.setdefault(i, states_TD.new_zeros(len(blocks), states_TD.shape[1]))[c] += states_TD.sum(0)
    return {i: _solve(gram[i], moment[i], counts_C, ridge, sharpness) for i in layers}


def _entering(model: Any, ids_BL: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """States (T, D) that enter the feed-forward of each layer."""
    from mixtura.hf import feed_forward_sites

    found: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[number] = args[0].reshape(-1, args[0].shape[-1]).float()

        return hook

    sites = feed_forward_sites(model)
    entries = {i: getattr(sites[i].parent, sites[i].name) for i in layers}
    handles = [entry.register_forward_pre_hook(keep(i)) for i, entry in entries.items()]
    try:
        model.eval()(ids_BL.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _solve(
    gram_DD: torch.Tensor, moment_CD: torch.Tensor, counts_C: torch.Tensor, ridge: float, sharpness: float
) -> torch.Tensor:
    T = counts_C.sum()
    centered_CD = moment_CD / T - (counts_C / T)[:, None] * moment_CD.sum(0) / T
    covariance_DD = gram_DD / T
    penalty = ridge * covariance_DD.diagonal().mean() * torch.eye(len(covariance_DD))
    rows_CD = torch.linalg.solve(covariance_DD + penalty, centered_CD.T).T
    mean_D = moment_CD.sum(0) / T
    logits_mean_C = rows_CD @ mean_D
    second_moment = ((rows_CD @ covariance_DD) * rows_CD).sum(1)
    spread = (second_moment.mean() - logits_mean_C.mean().square()).sqrt()
    return rows_CD * (sharpness / spread)
