"""A dense feed-forward layer as weights and a formula: what surgery reads and what the shared expert is made of.

D width, F width of the feed-forward, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from mixtura.nn.experts.activations import activation as activation_named


class FeedForwardWeights(NamedTuple):
    """A dense feed-forward layer, whatever its family calls the parts: down(act(gate x) * up x), or down(act(up x))."""

    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    gate_bias_F: torch.Tensor | None
    up_bias_F: torch.Tensor | None
    down_bias_D: torch.Tensor | None
    activation: str

    @property
    def dim(self) -> int:
        """D."""
        return self.up_FD.shape[1]

    @property
    def width(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    def slice(self, units: slice) -> FeedForwardWeights:
        """Some of the hidden units, as views; the output bias stays whole."""
        gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D, activation = self
        return FeedForwardWeights(
            None if gate_FD is None else gate_FD[units],
            up_FD[units],
            down_DF[:, units],
            None if gate_bias_F is None else gate_bias_F[units],
            None if up_bias_F is None else up_bias_F[units],
            down_bias_D,
            activation,
        )

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The layer as a formula."""
        act = activation_named(self.activation)
        up_TF = F.linear(hidden_TD, self.up_FD, self.up_bias_F)
        gated = self.gate_FD is not None
        inner_TF = act(F.linear(hidden_TD, self.gate_FD, self.gate_bias_F)) * up_TF if gated else act(up_TF)  # type: ignore[arg-type]
        return F.linear(inner_TF, self.down_DF, self.down_bias_D)
