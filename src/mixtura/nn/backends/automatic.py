"""The backend ``mixtura``: for each call the one that the rules take.

T tokens, D width, E experts, K slots a token.
"""

from __future__ import annotations

import bisect
import functools

import torch
from torch import nn

from mixtura.nn.backends import rules
from mixtura.nn.backends.grouped import compute_grouped, why_not_grouped
from mixtura.nn.backends.native.experts import compute, dtype_of, form_of, is_watched, refusal, tensors_of
from mixtura.nn.backends.native.library import library
from mixtura.nn.backends.native.ops import Tensors
from mixtura.nn.backends.sorted import sorted_backend

_BOUNDARIES = rules.boundaries()


def automatic_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts by the first backend of ``mixtura.nn.backends.rules`` that can."""
    form, tensors = form_of(experts), tensors_of(experts)
    for name in _names(tensors, hidden_TD, indices_TK, weights_TK):
        if name == "native" and not refusal(experts, form, tensors, hidden_TD):
            return compute(form, tensors, hidden_TD, indices_TK, weights_TK)
        if name == "grouped" and not why_not_grouped(experts, hidden_TD):
            return compute_grouped(experts, hidden_TD, indices_TK, weights_TK)
        if name == "sorted":
            break
    return sorted_backend(experts, hidden_TD, indices_TK, weights_TK)


def _names(
    tensors: Tensors, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[str, ...]:
    """Backends that the rules take for the call, the best first."""
    dtype = dtype_of(hidden_TD)
    device = "cpu" if hidden_TD.is_cpu else hidden_TD.device.type
    training = torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad or _learns(tensors))
    cast = tensors[0].dtype != dtype
    if is_watched():
        return _of_traced(device, dtype, training, cast)  # type: ignore[no-any-return]
    level = bisect.bisect(_BOUNDARIES, indices_TK.numel() / tensors[0].size(0))
    return _of_call(device, dtype, training, cast, _instructions(), level)


def _learns(tensors: Tensors) -> bool:
    first, down, first_bias, down_bias = tensors
    if first.requires_grad or down.requires_grad or first_bias is None or down_bias is None:
        return first.requires_grad or down.requires_grad
    return first_bias.requires_grad or down_bias.requires_grad


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _of_traced(device: str, dtype: torch.dtype, training: bool, cast: bool) -> tuple[str, ...]:
    call = rules.Call(device, dtype, training, True, cast, _instructions().decode())
    return tuple(rule.takes for rule in rules.fitting(call))


@functools.cache
def _of_call(device: str, dtype: torch.dtype, training: bool, cast: bool, isa: bytes, level: int) -> tuple[str, ...]:
    call = rules.Call(device, dtype, training, False, cast, isa.decode(), (0.0, *_BOUNDARIES)[level])
    return tuple(rule.takes for rule in rules.fitting(call))


def _instructions() -> bytes:
    lib = library()
    return b"" if lib is None else lib.mixtura_isa()
