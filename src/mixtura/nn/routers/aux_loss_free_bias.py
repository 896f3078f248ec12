"""Balance without a loss: each expert has a bias that chooses and never weighs, and is moved after every step.

    s = sigmoid(x W^T) (or softmax) in float32;  indices = top-k of s + b, in the best groups;  weights = s at indices,
    divided by their sum if asked, times a scale;  after each optimizer step  b_e += rate * sign(mean(c) - c_e)

c_e are the slots that expert e got in the whole step (all micro-batches and processes, padding not counted); whoever
trains calls ``end_step`` with them. b is a buffer in float32 whatever the model's type is (steps of 1e-3 vanish in
bfloat16), is saved with the model, has no gradient, and enters neither the weights nor theirs. It is moved back to
mean 0, which changes no choice. A token's groups are those with the largest sum of their two best s + b.

Near balance it goes on stepping to and fro by the rate; DeepSeek-V3 sets it to 0 late in training (``router.rate``).

Paper versus code: released models of transformers hold such biases and never update them; ``update_bias`` does it for
any tensor. DeepSeek-V3's tiny sequence-wise loss is no part of this router.

Reference: Wang et al., arXiv:2408.15664, algorithm 1; DeepSeek-AI, arXiv:2412.19437, eq. 12-16.

E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.registry import method
from mixtura.core.selection import GroupScore, SelectionSpec
from mixtura.nn.routers.base import LinearGate, Router, warn_of_a_constant_weight


@method("aux-loss-free-bias", role="router", paper="arXiv:2408.15664")
class AuxLossFreeRouter(Router):
    """Top-k router that balances itself; the file's docstring is its card.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        k: experts a token.
        score: function of the logits that gives the scores.
        renormalize: None, or the order of the norm that divides the weights (1: their sum).
        scale: factor on the weights.
        groups: number of equal groups of experts.
        groups_kept: groups that a token may choose from.
        group_score: how a group is scored: its best expert, or the sum of its two best.
        rate: step of the bias.
        recenter: whether the bias is moved back to mean 0 after every step.

    Raises:
        OptionError: on a value outside of what is accepted.
    """

    selection_bias: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: float | None = 1.0,
        scale: float = 1.0,
        groups: int = 1,
        groups_kept: int = 1,
        group_score: GroupScore = "top2-sum",
        rate: float = 1e-3,
        recenter: bool = True,
    ) -> None:
        spec = SelectionSpec(
            k=k,
            score=score,
            renormalize=renormalize,
            scale=scale,
            groups=groups,
            groups_kept=groups_kept,
            group_score=group_score,
        )
        super().__init__(LinearGate(dim, num_experts), spec, num_experts)
        warn_of_a_constant_weight(spec, num_experts)
        if not rate >= 0:
            raise OptionError(f"rate must be at least 0, got {rate}")
        self.rate, self.recenter = rate, recenter
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))

    @property
    def selection_bias_E(self) -> torch.Tensor:
        """b."""
        return self.selection_bias

    def end_step(self, counts_E: torch.Tensor) -> None:
        """Move the bias; see ``update_bias``."""
        update_bias(self.selection_bias, counts_E, self.rate, self.recenter)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        bias_E = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != bias_E.dtype:  # the model's type was changed, not its device alone
            self.selection_bias = bias_E.to(self.selection_bias.device)
        return self


@torch.no_grad()
def update_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float, recenter: bool = True) -> None:
    """b_e += rate * sign(mean(c) - c_e), in place; nothing moves if nothing was counted.

    Args:
        bias_E: of the selection, in float32; any shape with E entries.
        counts_E: slots that each expert got in one optimizer step.
        rate: step.
        recenter: whether b is moved back to mean 0 afterwards.

    Raises:
        ShapeError: if there are not as many counts as biases.

    Source:
        Wang et al., arXiv:2408.15664, algorithm 1.
    """
    if counts_E.numel() != bias_E.numel():
        raise ShapeError(f"counts_E must have {bias_E.numel()} entries, got {counts_E.numel()}")
    if not counts_E.any():
        return
    counts_E = counts_E.to(bias_E.device).view_as(bias_E)
    # sums of whole numbers, as a mean that is rounded could make balanced experts differ
    bias_E += rate * (counts_E.sum() - counts_E * counts_E.numel()).sign()
    if recenter:
        bias_E -= bias_E.mean()
