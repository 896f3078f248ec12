"""The backend ``mixtura``: the library where it can compute the call, else torch."""

from __future__ import annotations

import torch
from torch import nn

from mixtura.nn.backends.native import native_backend, why_not
from mixtura.nn.backends.sorted import sorted_backend


@torch.compiler.disable(reason="the library is called by pointers; compile without fullgraph=True")  # type: ignore[untyped-decorator, no-untyped-call]
def automatic_backend(
    experts: nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Compute experts by ``native_backend`` if it can, otherwise (another device or type) by ``sorted_backend``."""
    backend = sorted_backend if why_not(experts, hidden_TD) else native_backend
    return backend(experts, hidden_TD, indices_TK, weights_TK)
