"""In torch: sort slots by expert, one matrix product a projection and expert, nothing dropped.

T tokens, D width, E experts, K slots a token, S filled slots sorted by expert, n of them of one expert, F expert width.
Empty slots (index E) sort last and are cut off; an expert without a token costs nothing forward and gets a zero
gradient. Projections are taken apart by ``unbind`` and slots by ``split``: indexing would make backward fill a full
stack of zeros for every expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def sorted_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts slot by slot in the order of the experts; equal to ``naive_backend`` up to rounding."""
    return in_order(_all_experts, experts, hidden_TD, indices_TK, weights_TK)


def in_order(
    all_experts: Callable[[nn.Module, torch.Tensor, list[int]], torch.Tensor],
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Sum of the weighed outputs of a token's slots.

    Args:
        all_experts: from the tokens (S, D) of the filled slots in the order of the experts, and their number for each
            expert, to f_e of each.
        experts: its first argument.
        hidden_TD: tokens.
        indices_TK: experts of the slots.
        weights_TK: of the slots.
    """
    T, K = indices_TK.shape
    D = hidden_TD.shape[-1]
    E = int(experts.num_experts)  # type: ignore[arg-type]
    flat = indices_TK.reshape(-1)
    counts = flat.bincount(minlength=E + 1)[:E].tolist()
    slots_S = flat.argsort(stable=True)[: sum(counts)]
    out_SD = all_experts(experts, hidden_TD[slots_S // K], counts)
    out_SD = (out_SD * weights_TK.reshape(-1)[slots_S, None]).to(hidden_TD.dtype)
    out_TKD = hidden_TD.new_zeros(T * K, D).index_copy(0, slots_S, out_SD).view(T, K, D)
    return out_TKD.sum(1)


def _all_experts(experts: nn.Module, hidden_SD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """f_e of each block of tokens, blocks in the order of the experts."""
    first_weights, first_biases = _unbind(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    down_weights, down_biases = _unbind(experts, "down_proj")
    act = experts._apply_gate if experts.has_gate else experts.act_fn
    blocks = []
    for e, block_nD in enumerate(hidden_SD.split(counts)):  # type: ignore[no-untyped-call]
        # the first one always: a call without any token still has a graph, as gradients of ranks must have partners
        if len(block_nD) or e == 0:
            inner_nF = act(F.linear(block_nD, first_weights[e], first_biases[e]))  # type: ignore[operator]
            blocks.append(F.linear(inner_nF, down_weights[e], down_biases[e]))
    out_SD = torch.cat(blocks)
    return experts.post_expert_norm(out_SD) if experts.has_post_expert_norm else out_SD  # type: ignore[operator]


def _unbind(
    experts: nn.Module, name: str
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | tuple[None, ...]]:
    weights = getattr(experts, name)
    weights = weights.transpose(1, 2) if experts.is_transposed else weights
    biases = getattr(experts, f"{name}_bias").unbind() if experts.has_bias else (None,) * len(weights)
    return weights.unbind(), biases
