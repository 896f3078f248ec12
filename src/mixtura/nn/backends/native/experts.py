"""From a module with stacked experts, ours or transformers', to a call of the library.

T tokens, D width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn.backends.native.activation import experts_activation
from mixtura.nn.backends.native.library import ExpertsStruct, GradientsStruct, library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def native_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts in the library, forward and backward.

    Raises:
        NotExpressibleError: if the library cannot, with the reason; see ``why_not``.
        ShapeError: if an index is negative, or tokens, indices and weights disagree.
    """
    if not len(hidden_TD) == len(indices_TK) or indices_TK.shape != weights_TK.shape or indices_TK.ndim != 2:
        raise ShapeError(
            f"hidden_TD {tuple(hidden_TD.shape)}, indices_TK {tuple(indices_TK.shape)} and weights_TK "
            f"{tuple(weights_TK.shape)} must be (T, D), (T, K), (T, K)"
        )
    if reason := why_not(experts, hidden_TD):
        raise NotExpressibleError(f"native experts: {reason}")
    inputs = (hidden_TD.contiguous(), indices_TK.long().contiguous(), weights_TK.float().contiguous())
    tensors = (*inputs, *_weights(experts), *_biases(experts))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Differentiable.apply(experts_struct(experts), *tensors)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(experts_struct(experts), *inputs)


class _Differentiable(torch.autograd.Function):
    """The same with gradients of tokens, weights of slots, and weights of experts."""

    @staticmethod
    def forward(ctx: Any, struct: ExpertsStruct, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.struct = struct
        ctx.save_for_backward(*tensors)
        return _forward(struct, *tensors[:3])  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, indices_TK, weights_TK, *experts = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden_TD) if wanted[1] else None
        d_weights = torch.empty_like(weights_TK)
        d_experts = [
            torch.zeros_like(t) if w and t is not None else None for t, w in zip(experts, wanted[4:], strict=True)
        ]
        first, down, first_bias, down_bias = d_experts
        places = (out_TD.contiguous(), d_hidden, d_weights, first, first_bias, down, down_bias)
        gradients = GradientsStruct(*(None if t is None else t.data_ptr() for t in places))
        T, K = indices_TK.shape
        workspace = _workspace(ctx.struct, T, K, backward=True)
        _library().mixtura_experts_backward(
            ctypes.byref(ctx.struct),
            hidden_TD.data_ptr(),
            indices_TK.data_ptr(),
            weights_TK.data_ptr(),
            ctypes.byref(gradients),
            workspace.data_ptr(),
            T,
            K,
            torch.get_num_threads(),
        )
        return None, d_hidden, None, d_weights, *d_experts


def _forward(
    struct: ExpertsStruct, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    (T, K), out_TD = indices_TK.shape, torch.empty_like(hidden_TD)
    workspace = _workspace(struct, T, K, backward=False)
    code = _library().mixtura_experts_forward(
        ctypes.byref(struct),
        hidden_TD.data_ptr(),
        indices_TK.data_ptr(),
        weights_TK.data_ptr(),
        out_TD.data_ptr(),
        workspace.data_ptr(),
        T,
        K,
        torch.get_num_threads(),
    )
    if code:
        raise ShapeError(f"indices_TK must be at least 0, got {int(indices_TK.min())}")
    return out_TD


def _workspace(struct: ExpertsStruct, T: int, K: int, *, backward: bool) -> torch.Tensor:
    size = _library().mixtura_workspace(ctypes.byref(struct), T, K, torch.get_num_threads(), backward)
    return torch.empty(size, dtype=torch.uint8)


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib


def why_not(experts: nn.Module, hidden_TD: torch.Tensor) -> str:
    """Why the library cannot compute these experts for these tokens; "" if it can."""
    first, down = _weights(experts)
    tensors = [first, down, *(t for t in _biases(experts) if t is not None)]
    if library() is None:
        return "the library was not built, for want of a C++ compiler"
    if {t.device.type for t in (hidden_TD, *tensors)} != {"cpu"}:
        return f"it runs on the CPU, not on {hidden_TD.device.type}"
    if torch.is_autocast_enabled("cpu") or {t.dtype for t in (hidden_TD, *tensors)} not in ({d} for d in _DTYPES):
        return "tokens and weights must be float32 or bfloat16 alike, without autocast"
    if not all(t.is_contiguous() for t in tensors) or type(first) not in (nn.Parameter, torch.Tensor):
        return "weights must be plain and contiguous"
    if hidden_TD.ndim != 2 or hidden_TD.shape[-1] != (first.shape[1] if experts.is_transposed else first.shape[2]):
        return f"tokens must be of the experts' width, got shape {tuple(hidden_TD.shape)}"
    if experts.has_post_expert_norm:
        return "experts are normalized after the second projection"
    return "" if experts_activation(experts) is not None else "the activation is not one of its own"


def _weights(experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (experts.gate_up_proj if experts.has_gate else experts.up_proj), experts.down_proj


def _biases(experts: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not experts.has_bias:
        return None, None
    return (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias), experts.down_proj_bias


def experts_struct(experts: Any) -> ExpertsStruct:
    """Experts as the library sees them; their tensors must outlive it. They pass ``why_not``."""
    first, down = _weights(experts)
    E, D = down.shape[0], down.shape[2 if experts.is_transposed else 1]
    pointers = [None if t is None else t.data_ptr() for t in (first, _biases(experts)[0], down, _biases(experts)[1])]
    return ExpertsStruct(
        E,
        D,
        down.numel() // (E * D),
        *pointers,
        _DTYPES[first.dtype],
        experts_activation(experts),
        experts.has_gate,
        experts.is_transposed,
        not experts.is_concatenated,
        float(getattr(experts, "alpha", 0.0) or 0.0),
        float(getattr(experts, "limit", 0.0) or 0.0),
    )
