"""What every router is, and what most are: a gate that makes logits, and a ``SelectionSpec``.

T tokens, D width, E experts, K slots a token.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.errors import MixturaWarning
from mixtura.core.routing import Routing, keep
from mixtura.core.selection import SelectionSpec, WeightOn, select
from mixtura.nn.state import current_state


class LinearGate(nn.Module):
    """logits = x W^T (+ b), in float32 also under autocast and in models of lower precision; float64 stays.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        bias: whether the logits have a bias (gpt-oss has one).
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from N(0, std^2); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E) in float32, or in float64 for tokens in float64."""
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.linear(hidden_TD.to(wide), self.weight.to(wide), bias)


class BaseRouter(nn.Module):
    """Seam 1 of the library: a module from hidden_TD to a ``Routing``.

    Args:
        num_experts: E.

    Attributes:
        spec: how logits become a routing; None if they do so in another way, or there are none.
    """

    spec: SelectionSpec | None = None

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    @property
    def slots(self) -> int:
        """K, the most experts that one token can get."""
        return self.num_experts

    @property
    def weight_on(self) -> WeightOn:
        """Whether a weight multiplies its expert's output or input; read by the mixture."""
        return "output"

    @property
    def selection_bias_E(self) -> torch.Tensor | None:
        """Bias that chooses and never weighs; none unless a router overrides this."""
        return None

    def end_step(self, counts_E: torch.Tensor) -> None:
        """Called once after every optimizer step; nothing to do unless a router balances itself.

        Args:
            counts_E: slots that each expert got in the whole step: all micro-batches, all processes, padding not
                counted.
        """

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens; padding, known from the current ``RouterState``, gets empty slots.

        Raises:
            ShapeError: if the state's mask is of another number of tokens.
        """
        raise NotImplementedError


class Router(BaseRouter):
    """A gate and a selection spec.

    Args:
        gate: module from hidden_TD to logits_TE.
        spec: how logits become a routing.
        num_experts: E.

    Raises:
        OptionError: if the spec cannot choose among that many experts.
    """

    spec: SelectionSpec

    def __init__(self, gate: nn.Module, spec: SelectionSpec, num_experts: int) -> None:
        super().__init__(num_experts)
        spec.check_experts(num_experts)
        self.gate = gate
        self.spec = spec

    @property
    def slots(self) -> int:
        """K, slots of a token."""
        return self.spec.k

    @property
    def weight_on(self) -> WeightOn:
        """That of the spec."""
        return self.spec.weight_on

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens; padding, known from the current ``RouterState``, gets empty slots.

        Raises:
            ShapeError: if the state's mask is of another number of tokens.
        """
        return without_padding(select(self.gate(hidden_TD), self.spec, self.selection_bias_E))


def warn_of_a_constant_weight(spec: SelectionSpec, num_experts: int) -> None:
    """Warn the caller of a router's constructor if its gate can get no gradient; called in the constructor itself."""
    if num_experts > 1 and spec.weighs_constantly:
        warnings.warn(
            "a top-1 gate whose weight is renormalized is constant 1 and gets no gradient from the loss; "
            "use renormalize=None or k >= 2",
            MixturaWarning,
            stacklevel=4,
        )


def without_padding(routing: Routing) -> Routing:
    """The routing with the slots of padding emptied, which is known from the current ``RouterState``.

    Raises:
        ShapeError: if the state's mask is of another number of tokens.
    """
    state = current_state()
    return routing if state is None or state.mask_T is None else keep(routing, state.mask_T)
