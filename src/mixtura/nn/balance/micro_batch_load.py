"""Load of the micro-batch: every forward call balances itself.

    f = counts of this call / their sum

What transformers and most trainers do. The loss of a step then depends on how it was split: small micro-batches are
noisier, and push experts to be equally busy within every few sequences (so within every domain).

Reference: Fedus et al., arXiv:2101.03961, as it is usually implemented; what it does to specialization: Qiu et al.,
arXiv:2501.11873.
"""

from __future__ import annotations

import torch

from mixtura.core.registry import method
from mixtura.nn.balance.statistic import LoadStatistic, share


@method("micro-batch-load", role="statistic", paper="arXiv:2101.03961")
class MicroBatchLoad(LoadStatistic):
    """f of this forward call alone."""

    def observe(self, layer: str, counts_E: torch.Tensor) -> torch.Tensor:
        """Share of this call."""
        return share(counts_E)
