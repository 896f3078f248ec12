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
    if reason := why_not(experts, hidden_TD):
        raise NotExpressibleError(f"native experts: {reason}")
    return compute(experts, hidden_TD, indices_TK, weights_TK)


def compute(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """As ``native_backend``, for experts of which ``why_not`` has nothing to say."""
    if hidden_TD.shape[0] != indices_TK.shape[0] or indices_TK.shape != weights_TK.shape or indices_TK.ndim != 2:
        raise ShapeError(
            f"hidden_TD {tuple(hidden_TD.shape)}, indices_TK {tuple(indices_TK.shape)} and weights_TK "
            f"{tuple(weights_TK.shape)} must be (T, D), (T, K), (T, K)"
        )
    dtype, form = _dtype(hidden_TD), _form(experts)
    assert form is not None
    tokens_TD, *tensors = (_as(t, dtype) for t in (hidden_TD, *_tensors(experts)))
    inputs = (tokens_TD, _as(indices_TK, torch.int64), _as(weights_TK, torch.float32), *tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if _is_watched() or not all(t is None or type(t) in _PLAIN for t in inputs):
        out_TD = OPERATOR(*inputs, *form, keep)[0]
    elif keep:
        out_TD = Differentiable.apply(form, *inputs)  # type: ignore[no-untyped-call]
    else:
        out_TD = forward(*inputs, *form, keep)[0]  # type: ignore[arg-type, call-arg]
    return _as(out_TD, hidden_TD.dtype)  # type: ignore[return-value]


def why_not(experts: nn.Module, hidden_TD: torch.Tensor) -> str:
    """Why the library cannot compute these experts for these tokens; "" if it can."""
    tensors = [t for t in _tensors(experts) if t is not None]
    first = tensors[0]
    missing: str = _why_no_library()
    if missing:
        return missing
    if any(t.device.type != "cpu" for t in (hidden_TD, *tensors)):
        return f"it runs on the CPU, not on {hidden_TD.device.type}"
    dtypes = [t.dtype for t in (hidden_TD, *tensors)]
    if _dtype(hidden_TD) not in DTYPES or any(dtype not in DTYPES for dtype in dtypes):
        return "tokens and weights must be float32 or bfloat16"
    if not torch.is_autocast_enabled("cpu") and any(dtype != dtypes[0] for dtype in dtypes):
        return "tokens and weights must be of one type"
    if not all(t.is_contiguous() for t in tensors) or not all(_is_plain(t) for t in (hidden_TD, *tensors)):
        return "tokens and weights must be plain, and weights contiguous"
    if hidden_TD.ndim != 2 or hidden_TD.shape[-1] != (first.shape[1] if experts.is_transposed else first.shape[2]):
        return f"tokens must be of the experts' width, got shape {tuple(hidden_TD.shape)}"
    if experts.has_post_expert_norm:
        return "experts are normalized after the second projection"
    if not torch.compiler.is_compiling() and _is_transformed():
        return "it has no transforms of torch.func and no derivatives forward"
    return "" if _form(experts) is not None else "the activation is not one of its own"


def experts_struct(experts: Any) -> ExpertsStruct:
    """Experts as the library sees them; their tensors must outlive it. They pass ``why_not``."""
    first, down, *biases = _tensors(experts)
    form = _form(experts)
    assert form is not None
    return struct(first, down, biases, form)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_no_library() -> str:
    return why_no_library()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _form(experts: Any) -> Form | None:
    activation = experts_activation(experts)
    if activation is None:
        return None
    alpha, limit = (float(getattr(experts, name, 0.0) or 0.0) for name in ("alpha", "limit"))
    return Form(activation, experts.has_gate, experts.is_transposed, not experts.is_concatenated, alpha, limit)


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    """A tensor, or what stands for one while a call is traced."""
    return type(tensor) in _PLAIN or (_is_watched() and not is_traceable_wrapper_subclass(tensor))


def _is_watched() -> bool:
    """Whether torch must see an operator: there is a compiler, an export, or a mode that counts, fakes or records."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _is_transformed() -> bool:
    level: int = forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


def _dtype(hidden_TD: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_TD.dtype


def _tensors(experts: Any) -> Tensors:
    first, down = (experts.gate_up_proj if experts.has_gate else experts.up_proj), experts.down_proj
    if not experts.has_bias:
        return first, down, None, None
    return (
        first,
        down,
        (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias),
        experts.down_proj_bias,
    )
