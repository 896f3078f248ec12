"""``ExpertGroup``: unlike forms side by side, by ranges of indices.

T tokens, D width, K slots a token, E experts of one form. The first form has the first indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mixtura.core.errors import OptionError


class ExpertGroup(nn.Module):
    """Several forms as one stack of experts.

    Args:
        forms: modules with ``num_experts`` and the seam ``(hidden_TD, indices_TK, weights_TK) -> hidden_TD``.

    Raises:
        OptionError: if there are fewer than two forms, or they have different widths D.
    """

    def __init__(self, forms: Sequence[nn.Module]) -> None:
        super().__init__()
        dims = sorted(int(form.dim) for form in forms)  # type: ignore[arg-type]
        if len(dims) < 2 or dims[0] != dims[-1]:
            raise OptionError(f"forms must be two or more of the same dim, got dims {dims}")
        self.forms = nn.ModuleList(forms)
        self.dim = dims[0]
        self.num_experts = sum(int(form.num_experts) for form in forms)  # type: ignore[arg-type, misc]

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum over the forms; each sees the slots of the others as empty."""
        out_TD = torch.zeros_like(hidden_TD)
        first = 0
        for form in self.forms:
            E = int(form.num_experts)  # type: ignore[arg-type]
            local_TK = indices_TK - first
            outside_TK = (local_TK < 0) | (local_TK >= E)
            local_TK = local_TK.masked_fill(outside_TK, E)
            out_TD = out_TD + form(hidden_TD, local_TK, weights_TK.masked_fill(outside_TK, 0))
            first += E
        return out_TD
