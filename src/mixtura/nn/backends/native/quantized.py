"""From a module whose experts are quantized to a call of the library. Forward alone.

T tokens, D width, K slots a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn.backends.native.activation import experts_activation
from mixtura.nn.backends.native.library import ExpertsStruct, library, why_no_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _I32 = ctypes.c_void_p, ctypes.c_int32


class CodesStruct(ctypes.Structure):
    """``mixtura_codes`` of mixtura_native.h."""

    _fields_ = tuple((name, _POINTER) for name in ("codes", "scales", "zeros"))


class QuantizedStruct(ctypes.Structure):
    """``mixtura_quantized`` of mixtura_native.h."""

    _fields_ = (
        ("experts", ExpertsStruct),
        ("first", CodesStruct),
        ("down", CodesStruct),
        *((name, _I32) for name in ("bits", "group", "half_scales", "levels")),
    )


def quantized_native_backend(
    experts: Any, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute quantized experts in the library.

    Raises:
        NotExpressibleError: if the library cannot, with the reason; see ``why_not_quantized``.
        ShapeError: if an index is negative, or tokens, indices and weights disagree.
    """
    if reason := why_not_quantized(experts, hidden_TD, weights_TK):
        raise NotExpressibleError(f"native quantized experts: {reason}")
    return compute_quantized(experts, hidden_TD, indices_TK, weights_TK)


def compute_quantized(
    experts: Any, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The same of experts that the library does not refuse."""
    if not len(hidden_TD) == len(indices_TK) or indices_TK.shape != weights_TK.shape or indices_TK.ndim != 2:
        raise ShapeError(
            f"hidden_TD {tuple(hidden_TD.shape)}, indices_TK {tuple(indices_TK.shape)} and weights_TK "
            f"{tuple(weights_TK.shape)} must be (T, D), (T, K), (T, K)"
        )
    lib = library()
    assert lib is not None
    struct, (T, K), threads = quantized_struct(experts, hidden_TD.dtype), indices_TK.shape, torch.get_num_threads()
    inputs = (hidden_TD.contiguous(), indices_TK.long().contiguous(), weights_TK.float().contiguous())
    out_TD = torch.empty_like(inputs[0])
    workspace = torch.empty(lib.mixtura_quantized_workspace(ctypes.byref(struct), T, K, threads), dtype=torch.uint8)
    places = [t.data_ptr() for t in (*inputs, out_TD, workspace)]
    if lib.mixtura_quantized_forward(ctypes.byref(struct), *places, T, K, threads):
        raise ShapeError(f"indices_TK must be at least 0, got {int(indices_TK.min())}")
    return out_TD


def why_not_quantized(experts: Any, hidden_TD: torch.Tensor, weights_TK: torch.Tensor) -> str:
    """Why the library cannot compute these experts for these tokens; "" if it can."""
    tensors = [t for t in experts.parameters(recurse=False) if t is not None]
    floats = [hidden_TD, *(t for t in _biases(experts) if t is not None)]
    if missing := why_no_library():
        return missing
    if torch._C._is_tracing():
        return "a trace sees none of its operations"
    if {t.device.type for t in (hidden_TD, *tensors)} != {"cpu"}:
        return f"it runs on the CPU, not on {hidden_TD.device.type}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weights_TK, *floats)):
        return "it has no gradients of quantized experts"
    if torch.is_autocast_enabled("cpu") or {t.dtype for t in floats} not in ({d} for d in _DTYPES):
        return "tokens and biases must be float32 or bfloat16 alike, without autocast"
    if not all(t.is_contiguous() for t in tensors):
        return "weights must be contiguous"
    if hidden_TD.ndim != 2 or hidden_TD.shape[-1] != experts.inputs[_first(experts)]:
        return f"tokens must be of the experts' width, got shape {tuple(hidden_TD.shape)}"
    if experts.has_post_expert_norm:
        return "experts are normalized after the second projection"
    return "" if experts_activation(experts) is not None else "the activation is not one of its own"


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _biases(experts: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not experts.has_bias:
        return None, None
    return getattr(experts, f"{_first(experts)}_bias"), experts.down_proj_bias


def quantized_struct(experts: Any, dtype: torch.dtype) -> QuantizedStruct:
    """Quantized experts as the library sees them; their tensors must outlive it. They pass ``why_not_quantized``."""
    how, (first_bias, down_bias) = experts.quantization, (_pointer(t) for t in _biases(experts))
    E, D, F = len(experts.down_proj), experts.inputs[_first(experts)], experts.inputs["down_proj"]
    form = (_DTYPES[dtype], experts_activation(experts), experts.has_gate, False, not experts.is_concatenated)
    alpha, limit = (float(experts.__dict__.get(name) or 0.0) for name in ("alpha", "limit"))
    return QuantizedStruct(
        ExpertsStruct(E, D, F, None, first_bias, None, down_bias, *form, alpha, limit),
        *(CodesStruct(*map(_pointer, experts.codes(name))) for name in (_first(experts), "down_proj")),
        how.bits,
        how.group_size,
        how.scale_dtype == "float16",
        how.levels,
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
