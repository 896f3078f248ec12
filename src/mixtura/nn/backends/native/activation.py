"""Which activation of the library a module computes: found by comparing values, not by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mixtura.nn.experts.activations import ACTIVATIONS

# numbered as in mixtura_native.h
PLAIN = ("linear", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2")
CLAMPED = 7
_FOUND: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


@torch.no_grad()
def activation_number(function: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
    """Number of a function of one tensor in mixtura_native.h; None if it is none of them."""
    x = torch.linspace(-9, 9, 145)
    seen = function(x.clone())
    fits = [number for number, name in enumerate(PLAIN) if torch.allclose(ACTIVATIONS[name](x), seen, atol=1e-6)]
    return fits[0] if fits else None


def experts_activation(experts: nn.Module) -> int | None:
    """Number of what stacked experts, ours or transformers', compute between their projections; None if of none."""
    if experts not in _FOUND:
        _FOUND[experts] = _find(experts)
    return _FOUND[experts]


@torch.no_grad()
def _find(experts: Any) -> int | None:
    if not experts.has_gate:
        return activation_number(experts.act_fn)
    x = torch.linspace(-9, 9, 145)
    gate, up = torch.cat([x, x]), torch.cat([x.flip(0), 0.5 * x + 1])
    both = torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], -1).reshape(-1)
    seen = experts._apply_gate(both[None])[0]
    for number, name in enumerate(PLAIN):
        if torch.allclose(ACTIVATIONS[name](gate) * up, seen, rtol=1e-5, atol=1e-6):
            return number
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if isinstance(alpha, float) and isinstance(limit, float):
        g = gate.clamp(max=limit)
        if torch.allclose((up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g), seen, rtol=1e-5, atol=1e-6):
            return CLAMPED
    return None
