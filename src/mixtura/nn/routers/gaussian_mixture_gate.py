"""Gaussian mixture gate: a token goes to the components that may have drawn it; gates are their responsibilities.

    L_e = log w_e + log |U_e| - 1/2 |(x - m_e) U_e|^2        U_e U_e^T the precision of component e
    weights and indices (T, K) = the K largest of softmax(L)  (renormalized: the responsibilities among those K)

U_e is upper triangular with the diagonal exp(s_e), so that any numbers are a mixture; at 0 it is the standard normal.
With k = E the dense responsibilities. ``mixtura.density.as_gate`` makes one of a mixture that was fitted to data; the
parameters can be trained on from there, or frozen.

Reference: Xu, Jordan and Hinton, An Alternative Model for Mixtures of Experts, NIPS 1994, eq. 6-8 (their gate, fitted
by EM).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from mixtura.core.errors import OptionError
from mixtura.core.registry import method
from mixtura.core.selection import SelectionSpec
from mixtura.nn.routers.base import Router, warn_of_a_constant_weight

Covariance = Literal["full", "diagonal"]


class GaussianGate(nn.Module):
    """Log weights plus log densities of Gaussians, less the constant that all share; in float32, or float64.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        covariance: "full", or "diagonal" for independent columns.

    Raises:
        OptionError: if covariance is neither.
    """

    def __init__(self, dim: int, num_experts: int, *, covariance: Covariance = "full") -> None:
        super().__init__()
        if covariance not in get_args(Covariance):
            raise OptionError(f"covariance must be one of 'full', 'diagonal', got {covariance!r}")
        self.log_weight = nn.Parameter(torch.zeros(num_experts))
        self.mean = nn.Parameter(torch.empty(num_experts, dim))
        self.log_scale = nn.Parameter(torch.zeros(num_experts, dim))
        self.skew = nn.Parameter(torch.zeros(num_experts, dim, dim)) if covariance == "full" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the means from N(0, 1); covariances are 1, weights equal."""
        nn.init.normal_(self.mean)
        for parameter in (self.log_weight, self.log_scale, self.skew):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E)."""
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            log_scale_ED = self.log_scale.to(wide)
            away_TED = hidden_TD.to(wide)[:, None] - self.mean.to(wide)
            white_TED = away_TED * log_scale_ED.exp()
            if self.skew is not None:
                white_TED = white_TED + torch.einsum("ted,edf->tef", away_TED, self.skew.to(wide).triu(1))
            return self.log_weight.to(wide) + log_scale_ED.sum(-1) - 0.5 * white_TED.square().sum(-1)


@method("gaussian-mixture-gate", role="router", seeds=("000", "003"))
class GaussianMixtureRouter(Router):
    """Router by responsibilities of a Gaussian mixture; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E, components.
        k: components of a token.
        covariance: "full", or "diagonal" for independent columns.
        renormalize: None for the responsibilities themselves, 1 for those among the chosen components.

    Raises:
        OptionError: on a value outside of what is accepted, or k > num_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        covariance: Covariance = "full",
        renormalize: float | None = 1.0,
    ) -> None:
        spec = SelectionSpec(k=k, renormalize=renormalize)
        super().__init__(GaussianGate(dim, num_experts, covariance=covariance), spec, num_experts)
        warn_of_a_constant_weight(spec, num_experts)
