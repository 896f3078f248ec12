"""Load of the step before: additive over tokens, so exact however a step is split.

    f = counts of the whole previous step, all micro-batches and processes / their sum;  uniform in the first step

With f known before the step begins, loss = E sum_e f_e P_e is a mean over tokens: accumulation 4, accumulation 1, two
processes and any mixture of them give the same gradient. f is one step old; as it changes slowly, so does what it asks.
In the first step the loss is 1 for any router and has no gradient.

Reference: the loss is that of Fedus et al., arXiv:2101.03961, eq. 4-6; the lagged f is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mixtura.core.registry import method
from mixtura.nn.balance.statistic import Counts, LoadStatistic, share


@method("previous-step-load", role="statistic")
class PreviousStepLoad(LoadStatistic):
    """f of the previous optimizer step; uniform at first."""

    def __init__(self) -> None:
        self.counts: dict[str, torch.Tensor] = {}

    def observe(self, layer: str, counts_E: torch.Tensor) -> torch.Tensor:
        """Share of the previous step."""
        if layer not in self.counts:
            return share(torch.ones_like(counts_E))
        self.counts[layer] = self.counts[layer].to(counts_E.device)
        return share(self.counts[layer])

    def end_step(self, counts: Counts) -> None:
        """Keep what was counted; a layer in which nothing was counted keeps what it had."""
        self.counts.update({layer: counts_E for layer, counts_E in counts.items() if counts_E.any()})

    def state_dict(self) -> dict[str, list[int]]:
        """Counts by layer."""
        return {layer: counts_E.tolist() for layer, counts_E in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Take up counts by layer."""
        self.counts = {layer: torch.tensor(counts) for layer, counts in state.items()}
