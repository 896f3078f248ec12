"""What a stream of batches has told so far. Source: Cappe and Moulines, arXiv:0712.4273.

After each batch the kept statistics move towards the batch's, per unit of weight, by a step of (t + 2)^-0.6 in batch
t; the first batch is taken whole. Parameters are those that maximize the likelihood of the kept statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixtura.density._statistics import Statistics
from mixtura.density.priors import NIW

DECAY = 0.6


@dataclass(frozen=True)
class Stream:
    """Statistics of a stream, per unit of weight.

    Attributes:
        prior: resolved from the first batch, or None.
        kept: blended statistics, of weight 1, or None before the first batch.
        n_batches: batches seen.
        weight: of all rows seen.
    """

    prior: NIW | None = None
    kept: Statistics | None = None
    n_batches: int = 0
    weight: float = 0.0

    def see(self, batch: Statistics | None, forget: float | None = None) -> Stream:
        """The stream after one more batch; ``forget`` is the least step."""
        if batch is None:
            return self
        share = batch * (1 / batch.weight)
        if self.kept is not None:
            step = max((self.n_batches + 2) ** -DECAY, forget or 0.0)
            share = self.kept * (1 - step) + share * step
        return Stream(self.prior, replace(share, weight=1.0), self.n_batches + 1, self.weight + batch.weight)

    @property
    def total(self) -> Statistics:
        """The kept statistics at the weight of everything seen."""
        return self.kept * self.weight  # type: ignore[operator]
