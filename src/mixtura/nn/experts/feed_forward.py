"""Feed-forward experts, stacked, in every layout that transformers uses.

E experts, D width, F expert width. In memory, by layout (C = 2F gated, F plain):

    plain         up_proj (E, F, D)                     down_proj (E, D, F)
    gated         gate_up_proj (E, 2F, D), gate first   down_proj (E, D, F)
    transposed    gate_up_proj (E, D, C)                down_proj (E, F, D)
    interleaved   gate and up alternate along C, gate at even places
    biases        gate_up_proj_bias (E, C)              down_proj_bias (E, D)

The attributes are those that transformers' backends read, so any backend computes these experts and ours compute
theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.registry import method
from mixtura.nn.backends import automatic_backend
from mixtura.nn.experts.activations import activation as activation_named

Backend: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ExpertView(NamedTuple):
    """One expert's weights whatever the layout; views that write through (``view.up_FD.copy_(...)``)."""

    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    gate_bias_F: torch.Tensor | None
    up_bias_F: torch.Tensor | None
    down_bias_D: torch.Tensor | None


def view_expert(experts: nn.Module, e: int) -> ExpertView:
    """Weights of expert e of any module in a layout of transformers, ours or theirs.

    Raises:
        NotExpressibleError: if the experts are quantized.
    """
    if not experts.down_proj.is_floating_point():  # type: ignore[operator]
        raise NotExpressibleError("experts are quantized: there are no weights to view; model.dequantize() makes some")
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    first_CD, down_DF = getattr(experts, first)[e], experts.down_proj[e]  # type: ignore[index]
    if experts.is_transposed:
        first_CD, down_DF = first_CD.T, down_DF.T
    first_bias_C = getattr(experts, f"{first}_bias")[e] if experts.has_bias else None
    gate, up = _halves(first_CD, experts)
    gate_bias, up_bias = (None, None) if first_bias_C is None else _halves(first_bias_C, experts)
    assert up is not None
    down_bias_D = experts.down_proj_bias[e] if experts.has_bias else None  # type: ignore[index]
    return ExpertView(gate, up, down_DF, gate_bias, up_bias, down_bias_D)


def _halves(first_C: torch.Tensor, experts: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gate and up part of the first projection along its first axis."""
    if not experts.has_gate:
        return None, first_C
    if not experts.is_concatenated:
        return first_C[::2], first_C[1::2]
    gate, up = first_C.chunk(2, dim=0)
    return gate, up


@method("feed-forward", role="experts")
class Experts(nn.Module):
    """E feed-forward experts: f(x) = down(act(gate x) * up x), or down(act(up x)) without a gate.

    Args:
        num_experts: E.
        dim: D.
        width: F.
        activation: name, see ``activations``.
        gated: whether a gate multiplies the up projection.
        bias: whether all projections have biases.
        transposed: whether weights are stored (in, out).
        interleaved: whether gate and up rows alternate.

    Raises:
        OptionError: if a size is below 1, or interleaved without a gate.
        UnknownNameError: for an unknown activation.
    """

    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(
        self,
        num_experts: int,
        dim: int,
        width: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("width", width)):
            if value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        if interleaved and not gated:
            raise OptionError("interleaved needs gated=True: there is nothing to alternate with")
        self.num_experts, self.dim, self.width = num_experts, dim, width
        self.has_gate, self.has_bias = gated, bias
        self.is_transposed, self.is_concatenated = transposed, not interleaved
        self.act_fn = activation_named(activation)
        self.backend: Backend = automatic_backend
        C = 2 * width if gated else width
        self._add("gate_up_proj" if gated else "up_proj", C, dim)
        self._add("down_proj", dim, width)
        self.reset_parameters()

    def _add(self, name: str, out: int, into: int) -> None:
        shape = (into, out) if self.is_transposed else (out, into)
        self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *shape)))
        if self.has_bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, out)))

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw weights from N(0, std^2); biases start at 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def _apply_gate(self, gate_up_SC: torch.Tensor) -> torch.Tensor:
        """act(gate) * up; the name is the one that transformers' backends call."""
        if self.is_concatenated:
            gate, up = gate_up_SC.chunk(2, dim=-1)
        else:
            gate, up = gate_up_SC[..., ::2], gate_up_SC[..., 1::2]
        return self.act_fn(gate) * up

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Seam 2: sum over the slots of weight times expert; slots of index E are skipped."""
        return self.backend(self, hidden_TD, indices_TK, weights_TK)
