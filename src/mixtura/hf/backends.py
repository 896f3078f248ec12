"""Our backends in transformers' table of experts implementations, and theirs for our experts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from mixtura.core.errors import unknown_name
from mixtura.nn.backends import automatic_backend, naive_backend, sorted_backend

Backend = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OURS: dict[str, Backend] = {
    "mixtura": automatic_backend,
    "mixtura_sorted": sorted_backend,
    "mixtura_naive": naive_backend,
}

for _name, _backend in OURS.items():
    ExpertsInterface.register(_name, _backend)


def experts_backend(name: str) -> Backend:
    """What computes our experts under the name of an experts implementation.

    Foreign backends raise or read garbage at an empty slot, so they get the last expert with weight 0 there.

    Args:
        name: "mixtura", "mixtura_sorted", "mixtura_naive", "eager" (the naive one) or any that is registered in
            ``ExpertsInterface``.

    Raises:
        UnknownNameError: with the nearest name.
    """
    if name in OURS:
        return OURS[name]
    if name == "eager":
        return naive_backend
    if name not in ALL_EXPERTS_FUNCTIONS:
        raise unknown_name("experts implementation", name, ["eager", *ALL_EXPERTS_FUNCTIONS])
    return functools.partial(_without_empty_slots, ALL_EXPERTS_FUNCTIONS[name])


def _without_empty_slots(
    backend: Backend,
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    E = int(experts.num_experts)  # type: ignore[arg-type]
    weights_TK = weights_TK.masked_fill(indices_TK >= E, 0)
    return backend(experts, hidden_TD, indices_TK.clamp(max=E - 1), weights_TK)
