"""Stacked experts, ours or transformers', whose weights are quantized: the same module, under a class made for it.

In place of each weight the module has three parameters, with E first: codes under the name of the weight, ``_scale``
and, where groups have a zero of their own, ``_zero``. Gate and up rows that alternate are put one below the other, and
what lies (in, out) is turned. Biases stay. It computes itself: in the library, else (another device or type, gradients)
expert by expert in torch.

T tokens, D width, E experts, K slots a token, F expert width, C = 2F gated or F plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixtura.core.errors import NotExpressibleError
from mixtura.nn.backends.naive import one_expert
from mixtura.nn.backends.native.quantized import compute_quantized, why_not_quantized
from mixtura.nn.experts.quantization import SCALE_DTYPES, Codes, Quantization, check, dequantize, join_codes, quantize


class QuantizedExperts(nn.Module):
    """What the class of experts gets when their weights are quantized.

    Attributes:
        quantization: how.
        rows: rows of the quantized matrices by the name of a weight, gate and up apart.
        inputs: inputs of each weight.
        weight_dtype: type that the weights had, converted since as the model was.
    """

    quantization: Quantization
    rows: dict[str, tuple[int, ...]]
    inputs: dict[str, int]
    weight_dtype: torch.dtype

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Seam 2: sum over the slots of weight times expert; slots of index E are skipped."""
        backend = dequantizing_backend if why_not_quantized(self, hidden_TD, weights_TK) else compute_quantized
        return backend(self, hidden_TD, indices_TK, weights_TK)

    def codes(self, name: str) -> Codes:
        """Those of all experts."""
        return Codes(getattr(self, name), getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero", None))

    def weight(self, name: str, e: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight of one expert as it was before, up to rounding, in its own layout."""
        codes = Codes(*(None if t is None else t[e] for t in self.codes(name)))  # type: ignore[arg-type]
        parts = dequantize(codes, self.rows[name], self.inputs[name], self.quantization)
        whole = torch.cat(parts) if self.is_concatenated else torch.stack(parts, 1).flatten(0, 1)
        return (whole.T if self.is_transposed else whole).to(dtype)

    def coded_weights(self) -> dict[int, int]:
        """How many weights each parameter that holds some of their codes stands for, by its id."""
        numbers: dict[int, int] = {}
        for name, rows in self.rows.items():
            codes, *others = self.codes(name)
            numbers |= {id(codes): len(codes) * sum(rows) * self.inputs[name], **dict.fromkeys(map(id, others), 0)}
        return numbers

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the class that the experts had before: their own is made anew."""
        return _empty, (type(self).__bases__[1],), self.__dict__

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Scales keep their type, whatever type the model is converted to: they belong to the codes."""
        scales = {id(getattr(self, f"{name}_scale")) for name in self.rows}
        like: torch.Tensor = self.down_proj  # type: ignore[assignment]
        self.weight_dtype = fn(like.new_empty(0, dtype=self.weight_dtype)).dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            return tensor.to(made.device) if id(tensor) in scales and made.dtype != tensor.dtype else made

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


def weight_names(experts: Any) -> tuple[str, str]:
    """Names of the first and the second projection."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def quantize_experts(experts: nn.Module, how: Quantization) -> None:
    """Quantize the weights of a module, expert by expert, in place.

    Args:
        experts: stacked experts in any layout, ours or decorated ones of transformers. On the meta device they get
            their new form and no values.

    Raises:
        NotExpressibleError: if they are quantized already, or have no floating-point weights.
        OptionError: if a weight cannot be quantized.
    """
    weights = _weights(experts)
    made = {name: quantize_stack(experts, name, weight, how) for name, weight in weights.items()}
    experts.rows = {name: rows_of(experts, name, weight) for name, weight in weights.items()}  # type: ignore[assignment]
    experts.inputs = {name: w.shape[1 if experts.is_transposed else 2] for name, w in weights.items()}  # type: ignore[assignment]
    experts.quantization, experts.weight_dtype = how, weights["down_proj"].dtype  # type: ignore[assignment]
    for name, codes in made.items():
        for suffix, tensor in zip(("", "_scale", "_zero"), codes, strict=True):
            if tensor is not None:
                experts.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    experts.__class__ = _quantized_class(type(experts))  # type: ignore[arg-type]


def check_experts(experts: nn.Module, how: Quantization, where: str) -> None:
    """Raise what ``quantize_experts`` would, and change nothing.

    Args:
        experts: likewise.
        how: likewise.
        where: their name, for errors about a weight.

    Raises:
        NotExpressibleError: likewise.
        OptionError: likewise.
    """
    for name, weight in _weights(experts).items():
        check(f"{where}.{name}", weight.detach(), functools.partial(_quantize_one, experts, name, how=how))


def _weights(experts: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(experts, QuantizedExperts):
        raise NotExpressibleError("experts are quantized already")
    weights = {name: getattr(experts, name) for name in weight_names(experts)}
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim != 3:
            raise NotExpressibleError(f"{name} must be a stack of floating-point matrices to be quantized")
    return weights


def dequantize_experts(experts: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give quantized experts weights again, equal to their codes up to rounding, in place.

    Args:
        experts: quantized.
        dtype: of the weights; None is the type that they had, converted since as the model was.
    """
    assert isinstance(experts, QuantizedExperts)
    dtype = dtype or experts.weight_dtype
    made = {
        name: torch.stack([experts.weight(name, e, dtype) for e in range(len(getattr(experts, name)))])
        for name in experts.rows
    }
    experts.__class__ = type(experts).__bases__[1]
    for name, weight in made.items():
        for suffix in ("_scale", "_zero"):
            experts._parameters.pop(name + suffix, None)
        experts.register_parameter(name, nn.Parameter(weight))
    del experts.rows, experts.inputs, experts.quantization, experts.weight_dtype


def rows_of(experts: Any, name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """Rows of the matrices that a stacked weight is quantized as."""
    rows = weight.shape[2 if experts.is_transposed else 1]
    return (rows // 2, rows // 2) if name == "gate_up_proj" else (rows,)


def quantize_stack(experts: Any, name: str, weight_ECD: torch.Tensor, how: Quantization) -> Codes:
    """Codes of all experts of one weight; on the meta device only their shapes."""
    if weight_ECD.is_meta:
        inputs, empty = weight_ECD.shape[1 if experts.is_transposed else 2], weight_ECD.new_empty
        codes, scales = ((len(weight_ECD), *shape) for shape in how.shapes(rows_of(experts, name, weight_ECD), inputs))
        zeros = empty(scales, dtype=torch.uint8) if how.zero_point else None
        return Codes(empty(codes, dtype=torch.uint8), empty(scales, dtype=SCALE_DTYPES[how.scale_dtype]), zeros)
    return join_codes([_quantize_one(experts, name, weight, how) for weight in weight_ECD.detach()], torch.stack)


def _quantize_one(experts: Any, name: str, weight: torch.Tensor, how: Quantization) -> Codes:
    weight_CD = weight.T if experts.is_transposed else weight
    matrices = [weight_CD]
    if name == "gate_up_proj":
        matrices = list(weight_CD.chunk(2)) if experts.is_concatenated else [weight_CD[::2], weight_CD[1::2]]
    return join_codes([quantize(matrix, how) for matrix in matrices], torch.cat)


@functools.cache
def _quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{cls.__name__}", (QuantizedExperts, cls), {"__module__": cls.__module__})


def _empty(cls: type[nn.Module]) -> nn.Module:
    """Quantized experts of a class, before their state is set."""
    made = _quantized_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)


class _Dequantized:
    """One expert as ``one_expert`` reads it: weights by number, everything else of the module."""

    def __init__(self, experts: QuantizedExperts, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        if name not in self._experts.rows:
            return getattr(self._experts, name)
        return _Stack(functools.partial(self._experts.weight, name, dtype=self._dtype))


class _Stack:
    def __init__(self, get: Callable[[int], torch.Tensor]) -> None:
        self._get = get

    def __getitem__(self, e: int) -> torch.Tensor:
        return self._get(e)


def dequantizing_backend(
    experts: QuantizedExperts, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts one after the other in torch, on weights that exist for that long; the library's oracle.

    With gradients (of tokens, weights of slots and biases) each expert is dequantized again in backward.
    """
    view: Any = _Dequantized(experts, hidden_TD.dtype)
    out_TD = torch.zeros_like(hidden_TD)
    for e in torch.unique(indices_TK).tolist():
        if e >= len(experts.down_proj):  # type: ignore[arg-type]
            break
        token_S, slot_S = (indices_TK == e).nonzero(as_tuple=True)
        out_SD = checkpoint(one_expert, view, e, hidden_TD[token_S], use_reentrant=False)
        out_TD = out_TD.index_add(0, token_S, (out_SD * weights_TK[token_S, slot_S, None]).to(hidden_TD.dtype))
    return out_TD
