"""The backend ``mixtura``: the library where it can compute the call, else torch."""

from __future__ import annotations

import torch
from torch import nn

from mixtura.nn.backends.native.experts import native_or
from mixtura.nn.backends.sorted import sorted_backend


def automatic_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts by ``native_backend`` or by ``sorted_backend``, after ``mixtura.nn.backends.rules``."""
    return native_or(sorted_backend, experts, hidden_TD, indices_TK, weights_TK)
