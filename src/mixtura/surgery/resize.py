"""Routers and experts with another number of experts: rebuilt from their configuration, row by row.

Which axes of a tensor count experts is found by building the module twice and comparing shapes, so a gate's rows, its
bias, the bias of a selection and every stack of a form follow, whatever they are called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from mixtura.core import registry
from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError

New: TypeAlias = Callable[[str, tuple[torch.Tensor, ...]], torch.Tensor]


def resized(module: nn.Module, order: Sequence[int | None], new: New, **options: Any) -> nn.Module:
    """A module like this one whose experts are those of ``order``; the module stays as it is.

    Args:
        module: router or form of experts, registered as a method with an option ``num_experts``.
        order: for each new place the old expert, or None for a new one.
        new: what a new expert has, from the name of the tensor and the old experts' parts of it.
        **options: of the method that change besides.

    Raises:
        NotExpressibleError: if a tensor depends on the number of experts otherwise than by one entry each.
        OptionError: if the new number does not fit, or some of the experts are frozen.
    """
    made = _rebuilt(module, len(order) - int(module.num_experts), options)  # type: ignore[call-overload]
    old_state, state = module.state_dict(keep_vars=True), made.state_dict()
    for name, like in state.items():
        if name in old_state:
            _check_free(module, name)
            state[name] = _reordered(name, old_state[name].detach(), like, module, order, new)
        else:  # of an option that was off before: it starts as the method starts it
            state[name] = like.to(next(module.parameters()))
    device = next((tensor.device for tensor in old_state.values()), None)
    made.to(device).load_state_dict(state, assign=True)  # type: ignore[call-overload]
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(old_state[name].requires_grad if name in old_state else True)
    return made.train(module.training)


def _rebuilt(module: nn.Module, more: int, options: dict[str, Any]) -> nn.Module:
    config: dict[str, Any] | None = getattr(module, "method_config", None)
    if config is None or "num_experts" not in config:
        raise NotExpressibleError(f"{type(module).__name__} is no registered method with an option num_experts")
    changed = {**config, **options, "num_experts": config["num_experts"] + more}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", MixturaWarning)  # of choices that were made before
        made: nn.Module = registry.build(changed)
    return made


def _check_free(module: nn.Module, name: str) -> None:
    from mixtura.hf.frozen_rows import frozen_rows

    place, _, attribute = name.rpartition(".")
    if frozen_rows(module.get_submodule(place), attribute):
        raise OptionError(f"some experts of {name} are frozen: unfreeze them, and freeze again afterwards")


def _reordered(
    name: str, old: torch.Tensor, like: torch.Tensor, module: nn.Module, order: Sequence[int | None], new: New
) -> torch.Tensor:
    if old.ndim != like.ndim:
        raise NotExpressibleError(f"{name} has {old.ndim} axes, and {like.ndim} with another number of experts")
    made = old
    for axis, (before, after) in enumerate(zip(old.shape, like.shape, strict=True)):
        if before == after:
            continue
        if (before, after) != (module.num_experts, len(order)):
            raise NotExpressibleError(
                f"{name} of {type(module).__name__} has {before} entries for {module.num_experts} experts, and {after} "
                f"for {len(order)}: not one each"
            )
        parts = made.unbind(axis)
        made = torch.stack([new(name, parts) if place is None else parts[place] for place in order], axis)
    return made.clone()
