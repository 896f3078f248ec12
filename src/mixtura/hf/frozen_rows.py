"""Rows of a stacked parameter that stay as they are, bit for bit, while the other rows are trained.

A stack (E, ...) has one ``requires_grad`` for all of its experts. So the gradient of the held rows is set to 0 before
it is accumulated (clipping and momentum see nothing of them), and whatever an optimizer still does to them, as
decoupled weight decay does without any gradient, is undone when its step ends. That holds for every
``torch.optim.Optimizer`` whose parameters are those of the model; sharded copies of them (FSDP, ZeRO) are other tensors
and are not held.

Nothing of this is in a state dict. A deep or pickled copy of the module holds its own rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_PLACE = "_frozen_rows"  # of a module, a plain attribute: {name of the parameter: FrozenRows}
_HELD: weakref.WeakValueDictionary[int, FrozenRows] = weakref.WeakValueDictionary()


class FrozenRows:
    """Holds some rows of one parameter until ``release``.

    Args:
        parameter: that requires a gradient.
        rows: indices along its first axis.
    """

    def __init__(self, parameter: nn.Parameter, rows: tuple[int, ...]) -> None:
        self.parameter, self.rows = parameter, rows
        self._before: torch.Tensor | None = None
        self._handle = parameter.register_hook(self._without_gradient)
        if parameter.grad is not None:
            parameter.grad[list(rows)] = 0
        _HELD[id(parameter)] = self

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # a copy holds the copied parameter: neither hooks nor the table are copied
        return FrozenRows, (self.parameter, self.rows)

    def release(self) -> None:
        """Let gradients and optimizers at the rows again."""
        self._handle.remove()
        _HELD.pop(id(self.parameter), None)

    def remember(self) -> None:
        """Keep the rows as they are now."""
        self._before = self.parameter.detach()[list(self.rows)]

    def put_back(self) -> None:
        """Write what ``remember`` kept."""
        if self._before is not None:
            self.parameter.data[list(self.rows)] = self._before
        self._before = None

    def _without_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor(self.rows, device=gradient.device), 0)


def frozen_rows(module: nn.Module, name: str) -> tuple[int, ...]:
    """Which rows of a module's parameter are held."""
    held = vars(module).get(_PLACE, {}).get(name)
    return () if held is None else held.rows


def hold_rows(module: nn.Module, name: str, rows: tuple[int, ...]) -> None:
    """Hold exactly these rows of a module's parameter; none lets all of them go."""
    places = vars(module).setdefault(_PLACE, {})
    if name in places:
        places.pop(name).release()
    if rows:
        places[name] = FrozenRows(getattr(module, name), rows)


def _held_of(optimizer: torch.optim.Optimizer) -> list[FrozenRows]:
    if not _HELD:
        return []
    found = (_HELD.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"])
    return [held for held in found if held is not None]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for held in _held_of(optimizer):
        held.remember()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for held in _held_of(optimizer):
        held.put_back()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
