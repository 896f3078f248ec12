"""Slots sorted by expert, and torch's grouped product: one call a projection for all experts.

T tokens, D width, E experts, K slots a token, S filled slots sorted by expert, F expert width, C = 2F gated or F plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.errors import NotExpressibleError
from mixtura.nn.backends.native.experts import is_transformed, tensors_of
from mixtura.nn.backends.sorted import in_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # capability of a CUDA device
_LINE = 16  # bytes, of which rows must be a multiple
_product: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm


def grouped_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts by torch's grouped product; equal to ``naive_backend`` up to rounding.

    Raises:
        NotExpressibleError: if it cannot, with the reason; see ``why_not_grouped``.
    """
    if reason := why_not_grouped(experts, hidden_TD):
        raise NotExpressibleError(f"grouped experts: {reason}")
    return compute_grouped(experts, hidden_TD, indices_TK, weights_TK)


def compute_grouped(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The same of experts that it does not refuse."""
    return in_order(_all_experts, experts, hidden_TD, indices_TK, weights_TK)


def why_not_grouped(experts: Any, hidden_TD: torch.Tensor) -> str:
    """Why it cannot compute these experts for these tokens; "" if it can."""
    first, down, *_ = tensors_of(experts)
    if {first.dtype, down.dtype, hidden_TD.dtype} not in ({dtype} for dtype in DTYPES):
        return "tokens and weights must be float32, bfloat16 or float16 alike"
    if hidden_TD.is_cuda and torch.cuda.get_device_capability(hidden_TD.device) < _OLDEST:
        return "it needs a GPU of capability 8.0 or newer"
    if torch.is_autocast_enabled(hidden_TD.device.type):
        return "it knows no autocast"
    tensors = (hidden_TD, first, down)
    if is_transformed() or not all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors):
        return "tensors must be plain, without transforms of torch.func"
    if any(n * hidden_TD.element_size() % _LINE for t in tensors for n in t.shape[-2 if t.ndim == 3 else -1 :]):
        return f"widths must be multiples of {_LINE} bytes"
    return (
        "" if all(t.data_ptr() % _LINE == 0 for t in tensors) else f"tensors must begin at multiples of {_LINE} bytes"
    )


def _all_experts(experts: Any, hidden_SD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    first, down, first_bias, down_bias = tensors_of(experts)
    if not experts.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    counts_E = torch.tensor(counts, device=hidden_SD.device)
    inner_SC = _projected(hidden_SD, first, first_bias, counts_E)
    inner_SF = experts._apply_gate(inner_SC) if experts.has_gate else experts.act_fn(inner_SC)
    out_SD = _projected(inner_SF, down, down_bias, counts_E)
    normed_SD: torch.Tensor = experts.post_expert_norm(out_SD) if experts.has_post_expert_norm else out_SD
    return normed_SD


def _projected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts_E: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = _product(x, weight, offs=counts_E.cumsum(0, dtype=torch.int32))
    return out if bias is None else out + bias.repeat_interleave(counts_E, 0, output_size=len(x))
