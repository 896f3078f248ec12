"""Fitting to a stream: stepwise EM on sufficient statistics. Source: Cappe and Moulines, arXiv:0712.4273.

After each batch the kept statistics move towards the batch's, per unit of weight, by a step of (t + 2)^-0.6 in batch
t; the first batch is taken whole. Parameters are those that maximize the likelihood of the kept statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from sklearn.utils import check_random_state

from mixtura.core.errors import OptionError
from mixtura.density._base import MixtureBase
from mixtura.density._checks import check_rows
from mixtura.density._maximize import maximize
from mixtura.density._noise import log_uniform_density
from mixtura.density._statistics import Statistics

DECAY = 0.6


class Streaming(MixtureBase):
    """``partial_fit``."""

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, forget: float | None = None) -> Self:
        """One expectation and maximization with a batch of a stream.

        Args:
            X: (N, D); the first batch of a new mixture also finds the start, and needs at least K rows.
            y: as in ``fit``.
            sample_weight: as in ``fit``.
            forget: between 0 and 1: the step does not fall below it, so that old batches fade and drift is followed;
                None for steps that go to 0.

        Raises:
            OptionError: if forget lies outside of 0 .. 1.
        """
        if forget is not None and not 0 < forget <= 1:
            raise OptionError(f"forget must lie in 0 .. 1, got {forget!r}")
        K = self._check_options()
        begun = hasattr(self, "weights_")
        rows = check_rows(self, X, y, sample_weight, K=1 if begun else K, reset=not begun)
        model = self._model(rows)
        if not begun:
            self.noise_log_density_ = log_uniform_density(rows) if self.noise_component else None
            self._set_parameters(self._start(rows, model, check_random_state(self.random_state)))
        statistics = self._expectation(rows, self.parameters_)
        self.lower_bound_ = statistics.mean_log_likelihood
        self._set_parameters(maximize(self._blend(statistics, forget), model, self.parameters_))
        return self

    def _blend(self, batch: Statistics, forget: float | None) -> Statistics:
        """The kept statistics after a batch, at the weight of everything seen."""
        t = getattr(self, "n_batches_seen_", 0)
        self.n_batches_seen_ = t + 1
        self.weight_seen_ = getattr(self, "weight_seen_", 0.0) + batch.weight
        kept = batch
        if t:
            step = max((t + 2) ** -DECAY, forget or 0.0)
            kept = self._kept * (1 - step) + batch * (step / batch.weight)
        total = kept * (self.weight_seen_ / kept.weight)
        self._kept = replace(kept, weight=1.0) if t else kept * (1 / kept.weight)
        return total
