"""Which load f a balance loss sees: of this micro-batch, of the step so far, or of the step before.

A balance loss E sum_e f_e P_e is a product of two means. P is a mean over tokens, and its part of a micro-batch can
simply be added up. f is a constant without gradient, and can be taken from more tokens than one micro-batch has. Each
file of a statistic is one answer; what all of them count are filled slots of real tokens.

E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Counts = Mapping[str, torch.Tensor]


class LoadStatistic:
    """Load of the experts as the balance losses of a training run see it."""

    def observe(self, layer: str, counts_E: torch.Tensor) -> torch.Tensor:
        """f for one layer of one forward call.

        Args:
            layer: name of the mixture.
            counts_E: slots that each expert got in this call, of this process.

        Returns:
            The share of the slots that each expert got, (E,), float32, as this statistic has it.
        """
        raise NotImplementedError

    def end_step(self, counts: Counts) -> None:
        """The optimizer has made its step; ``counts`` are those of the whole step, of all processes, by layer."""

    def state_dict(self) -> dict[str, list[int]]:
        """What a resumed run needs; plain JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Take up what ``state_dict`` gave."""


def share(counts_E: torch.Tensor) -> torch.Tensor:
    """Counts as shares of their sum, float32; 0 where nothing was counted."""
    return counts_E.float() / counts_E.sum().clamp(min=1)


def sum_over_processes(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of a distributed run; the tensor itself in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    counts = counts.clone()
    torch.distributed.all_reduce(counts)
    return counts
