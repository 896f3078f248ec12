"""From a module with stacked experts, ours or transformers', to a call of the library.

T tokens, D width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn.backends.native.activation import experts_activation
from mixtura.nn.backends.native.library import ExpertsStruct, why_no_library
from mixtura.nn.backends.native.ops import DTYPES, OPERATOR, Differentiable, Form, Tensors, forward, struct

_PLAIN = (torch.Tensor, nn.Parameter)


def native_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts in the library, forward and backward; under autocast in its type.

    Raises:
        NotExpressibleError: if the library cannot, with the reason; see ``why_not``.
        ShapeError: if an index is negative, or tokens, indices and weights disagree.
    """
    form, tensors = form_of(experts), tensors_of(experts)
    if reason := refusal(experts, form, tensors, hidden_TD):
        raise NotExpressibleError(f"native experts: {reason}")
    return compute(form, tensors, hidden_TD, indices_TK, weights_TK)


def why_not(experts: nn.Module, hidden_TD: torch.Tensor) -> str:
    """Why the library cannot compute these experts for these tokens; "" if it can."""
    return refusal(experts, form_of(experts), tensors_of(experts), hidden_TD)


def compute(
    form: Any, tensors: Tensors, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts that the library does not refuse."""
    if hidden_TD.shape[0] != indices_TK.shape[0] or indices_TK.shape != weights_TK.shape or indices_TK.ndim != 2:
        raise ShapeError(
            f"hidden_TD {tuple(hidden_TD.shape)}, indices_TK {tuple(indices_TK.shape)} and weights_TK "
            f"{tuple(weights_TK.shape)} must be (T, D), (T, K), (T, K)"
        )
    dtype = dtype_of(hidden_TD)
    inputs: Any = (hidden_TD, indices_TK, weights_TK, *tensors)
    types = (dtype, torch.int64, torch.float32, dtype, dtype, dtype, dtype)
    inputs = [t if t is None or t.dtype == wanted else t.to(wanted) for t, wanted in zip(inputs, types, strict=True)]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if is_watched() or not all(t is None or type(t) in _PLAIN for t in inputs):
        out_TD = OPERATOR(*inputs, *form, keep)[0]
    elif keep:
        out_TD = Differentiable.apply(form, *inputs)  # type: ignore[no-untyped-call]
    else:
        out_TD = forward(*inputs, *form, keep)[0]  # type: ignore[call-arg]
    return out_TD if dtype == hidden_TD.dtype else out_TD.to(hidden_TD.dtype)  # type: ignore[no-any-return]


def refusal(experts: Any, form: Form | None, tensors: Tensors, hidden_TD: torch.Tensor) -> str:
    """As ``why_not``, for experts that were looked at."""
    missing: str = _why_no_library()
    if missing:
        return missing
    autocast = torch.is_autocast_enabled("cpu")
    for tensor in (hidden_TD, *tensors):
        if tensor is not None and (reason := _refusal_of(tensor, hidden_TD, autocast)):
            return reason
    if not all(t is None or t.is_contiguous() for t in tensors):
        return "weights must be contiguous"
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != tensors[0].shape[1 if experts.is_transposed else 2]:
        return f"tokens must be of the experts' width, got shape {tuple(hidden_TD.shape)}"
    if experts.has_post_expert_norm:
        return "experts are normalized after the second projection"
    if not torch.compiler.is_compiling() and is_transformed():
        return "it has no transforms of torch.func and no derivatives forward"
    return "" if form is not None else "the activation is not one of its own"


def _refusal_of(tensor: torch.Tensor, hidden_TD: torch.Tensor, autocast: bool) -> str:
    if not tensor.is_cpu:
        return f"it runs on the CPU, not on {tensor.device.type}"
    if tensor.dtype not in DTYPES or (autocast and torch.get_autocast_dtype("cpu") not in DTYPES):
        return "tokens and weights must be float32 or bfloat16"
    if tensor.dtype != hidden_TD.dtype and not autocast:
        return "tokens and weights must be of one type"
    return "" if _is_plain(tensor) else "tokens and weights must be plain tensors"


def experts_struct(experts: Any) -> ExpertsStruct:
    """Experts as the library sees them; their tensors must outlive it. They pass ``why_not``."""
    first, down, *biases = tensors_of(experts)
    form = form_of(experts)
    assert form is not None
    return struct(first, down, biases, form)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_no_library() -> str:
    return why_no_library()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def form_of(experts: Any) -> Form | None:
    """What the experts are besides their weights, None if the library has not their activation."""
    activation = experts_activation(experts)
    if activation is None:
        return None
    alpha, limit = (float(experts.__dict__.get(name) or 0.0) for name in ("alpha", "limit"))
    return Form(activation, experts.has_gate, experts.is_transposed, not experts.is_concatenated, alpha, limit)


def _is_plain(tensor: torch.Tensor) -> bool:
    """A tensor, or what stands for one while a call is traced."""
    return type(tensor) in _PLAIN or (is_watched() and not is_traceable_wrapper_subclass(tensor))


def is_watched() -> bool:
    """Whether torch must see an operator: there is a compiler, a trace, or a mode that counts, fakes or records."""
    tracing = torch.compiler.is_compiling() or torch._C._is_tracing()
    return tracing or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a transform of torch.func or a derivative forward is at work."""
    level: int = forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


def dtype_of(hidden_TD: torch.Tensor) -> torch.dtype:
    """That experts are computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_TD.dtype


def tensors_of(experts: Any) -> Tensors:
    """First and second projection, and their biases or None."""
    first, down = (experts.gate_up_proj if experts.has_gate else experts.up_proj), experts.down_proj
    if not experts.has_bias:
        return first, down, None, None
    return (
        first,
        down,
        (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias),
        experts.down_proj_bias,
    )
