"""The library's experts as operators of torch: ``mixtura::experts`` and its gradient, on tensors alone.

torch.compile and torch.export see one operator a layer. Both are functional. Tensors are on the CPU, all floating point
ones of float32 or of bfloat16 but for weights_TK, which is float32. Where nothing is traced, the same functions are
called past torch's dispatcher: an operator in Python costs 60 microseconds more where there is a gradient.

T tokens, D width, E experts, K slots a token, S = T K slots, F expert width, C = 2F gated or F plain.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.flop_counter import register_flop_formula

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn.backends.native.library import ExpertsStruct, GradientsStruct, library, why_no_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
Tensors: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Form(NamedTuple):
    """What experts are besides their weights; see ``mixtura_experts`` of mixtura_native.h."""

    activation: int
    gated: bool
    transposed: bool
    interleaved: bool
    alpha: float
    limit: float


def struct(first: torch.Tensor, down: torch.Tensor, biases: Sequence[torch.Tensor | None], form: Form) -> ExpertsStruct:
    """Experts as the library sees them; their tensors are contiguous, and must outlive it."""
    E, D = down.shape[0], down.shape[2 if form.transposed else 1]
    first_bias, down_bias = (None if bias is None else bias.data_ptr() for bias in biases)
    pointers = (first.data_ptr(), first_bias, down.data_ptr(), down_bias)
    return ExpertsStruct(E, D, down.numel() // (E * D), *pointers, DTYPES[first.dtype], *form)


def forward(
    hidden_TD: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first: torch.Tensor,
    down: torch.Tensor,
    first_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: int,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_TD, and what its gradient needs, (S, C) or (0, C).

    Raises:
        ShapeError: if an index is negative.
    """
    form = Form(activation, gated, transposed, interleaved, alpha, limit)
    inputs = [t.contiguous() for t in (hidden_TD, indices_TK, weights_TK)]
    first, down, *biases = _contiguous(first, down, first_bias, down_bias)
    described = struct(first, down, biases, form)
    out_TD, kept_SC = _outputs(hidden_TD, indices_TK, first, transposed, keep)
    workspace = _workspace(described, indices_TK, backward=False)
    places = [t.data_ptr() for t in (*inputs, out_TD)]
    code = _library().mixtura_experts_forward(
        ctypes.byref(described),
        *places,
        kept_SC.data_ptr() if keep else None,
        workspace.data_ptr(),
        *indices_TK.shape,
        torch.get_num_threads(),
    )
    _check(code, indices_TK)
    return out_TD, kept_SC


def _contiguous(
    first: torch.Tensor, down: torch.Tensor, first_bias: torch.Tensor | None, down_bias: torch.Tensor | None
) -> Tensors:
    biases = (None if bias is None else bias.contiguous() for bias in (first_bias, down_bias))
    return first.contiguous(), down.contiguous(), *biases  # type: ignore[return-value]


def _check(code: int, indices_TK: torch.Tensor) -> None:
    if code:
        raise ShapeError(f"indices_TK must be at least 0, got {int(indices_TK.min())}")


def _outputs(
    hidden_TD: torch.Tensor, indices_TK: torch.Tensor, first: torch.Tensor, transposed: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    S = indices_TK.shape[0] * indices_TK.shape[1] if keep else 0
    return hidden_TD.new_empty(hidden_TD.shape), hidden_TD.new_empty(S, first.shape[2 if transposed else 1])


def _fake(
    hidden_TD: torch.Tensor, indices_TK: torch.Tensor, _weights: Any, first: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(hidden_TD, indices_TK, first, rest[-5], rest[-1])


def backward(
    out_TD: torch.Tensor,
    kept_SC: torch.Tensor,
    hidden_TD: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first: torch.Tensor,
    down: torch.Tensor,
    first_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: int,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of hidden_TD, weights_TK, first, down and their biases, empty where none is wanted."""
    form = Form(activation, gated, transposed, interleaved, alpha, limit)
    out_TD, kept_SC, *inputs = (t.contiguous() for t in (out_TD, kept_SC, hidden_TD, indices_TK, weights_TK))
    first, down, *biases = experts = _contiguous(first, down, first_bias, down_bias)
    described = struct(first, down, biases, form)
    d_weights = torch.empty_like(inputs[2])
    others = _like((inputs[0], *experts), wanted)
    pointers = [t.data_ptr() if t.numel() else None for t in others]
    d_hidden, d_first, d_down, d_first_bias, d_down_bias = pointers
    places = (out_TD.data_ptr(), d_hidden, d_weights.data_ptr(), d_first, d_first_bias, d_down, d_down_bias)
    workspace = _workspace(described, indices_TK, backward=True)
    code = _library().mixtura_experts_backward(
        ctypes.byref(described),
        *(t.data_ptr() for t in inputs),
        kept_SC.data_ptr(),
        ctypes.byref(GradientsStruct(*places)),
        workspace.data_ptr(),
        *indices_TK.shape,
        torch.get_num_threads(),
    )
    _check(code, indices_TK)
    return [others[0], d_weights, *others[1:]]


def _like(tensors: Sequence[torch.Tensor | None], wanted: Sequence[bool]) -> list[torch.Tensor]:
    some = next(t for t in tensors if t is not None)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if w and t is not None else some.new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _fake_backward(
    out_TD: Any, kept_SC: Any, hidden_TD: torch.Tensor, indices_TK: Any, weights_TK: torch.Tensor, *rest: Any
) -> list[torch.Tensor]:
    others = _like((hidden_TD, *rest[:4]), rest[-1])
    return [others[0], weights_TK.new_empty(weights_TK.shape), *others[1:]]


def _workspace(described: ExpertsStruct, indices_TK: torch.Tensor, *, backward: bool) -> torch.Tensor:
    T, K = indices_TK.shape
    size = _library().mixtura_workspace(ctypes.byref(described), T, K, torch.get_num_threads(), backward)
    return torch.empty(size, dtype=torch.uint8)


def _library() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise NotExpressibleError(f"native experts: {why_no_library()}")
    return lib


class Differentiable(torch.autograd.Function):
    """``forward`` and ``backward`` where nothing is traced."""

    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Of the seven tensors; what the gradient needs is kept."""
        out_TD, kept_SC = forward(*tensors, *form, True)  # type: ignore[arg-type, call-arg]
        ctx.save_for_backward(kept_SC, *tensors)
        ctx.form = form
        return out_TD

    @staticmethod
    def backward(ctx: Any, out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Once: there are no second gradients."""
        if torch.is_grad_enabled():  # create_graph=True
            _no_second_gradient()
        return None, *_gradients(backward, ctx.needs_input_grad[1:], out_TD, *ctx.saved_tensors, *ctx.form)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.form, ctx.keep = inputs[7:13], inputs[13]


def _gradient(ctx: Any, out_TD: torch.Tensor, _kept: Any) -> tuple[torch.Tensor | None, ...]:
    if not ctx.keep:
        raise NotExpressibleError("mixtura::experts was called with keep=False, so it has no gradient")
    found = _gradients(OPERATOR_BACKWARD, ctx.needs_input_grad, out_TD, *ctx.saved_tensors, *ctx.form)
    return *found, *(None,) * 7


def _gradients(function: Any, needs: Sequence[bool], *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the seven tensors that experts are computed from; None where none is needed."""
    d_hidden, d_weights, *d_experts = function(*arguments, [needs[0], *needs[3:7]])
    found = (d_hidden, None, d_weights, *d_experts)
    return tuple(d if need else None for d, need in zip(found, needs, strict=False))


def _no_second_gradient(*arguments: Any) -> None:
    raise NotExpressibleError(
        "native experts have no second gradients, which create_graph=True asks for: choose the experts implementation "
        "'mixtura_sorted'"
    )


_EXPERTS = "Tensor hidden_TD, Tensor indices_TK, Tensor weights_TK, Tensor first, Tensor down, Tensor? first_bias, "
_EXPERTS += "Tensor? down_bias, int activation, bool gated, bool transposed, bool interleaved, float alpha, float limit"
_OPERATORS = torch.library.Library("mixtura", "DEF")  # type: ignore[no-untyped-call]
for _schema, _function in (
    (f"experts({_EXPERTS}, bool keep) -> (Tensor, Tensor)", forward),
    (f"experts_backward(Tensor out_TD, Tensor kept_SC, {_EXPERTS}, bool[] wanted) -> Tensor[]", backward),
):
    _name = _OPERATORS.define(_schema)  # type: ignore[no-untyped-call]
    _OPERATORS.impl(_name, _function, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("mixtura::experts", _fake, lib=_OPERATORS)
torch.library.register_fake("mixtura::experts_backward", _fake_backward, lib=_OPERATORS)
torch.library.register_autograd("mixtura::experts", _gradient, setup_context=_setup, lib=_OPERATORS)
torch.library.register_autograd(
    "mixtura::experts_backward", _no_second_gradient, setup_context=lambda ctx, inputs, output: None, lib=_OPERATORS
)


def _flops(
    _hidden: Any, indices: list[int], _weights: Any, first: list[int], down: list[int], *args: Any, **kwargs: Any
) -> int:
    """From shapes: of products, as torch counts them, as if no slot were empty."""
    return 2 * math.prod(indices) * (math.prod(first[1:]) + math.prod(down[1:]))


def _flops_backward(_out: Any, _kept: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(*args)


register_flop_formula(torch.ops.mixtura.experts)(_flops)
register_flop_formula(torch.ops.mixtura.experts_backward)(_flops_backward)
OPERATOR = torch.ops.mixtura.experts.default
OPERATOR_BACKWARD = torch.ops.mixtura.experts_backward.default
