"""Whether a model is what it was: the same modules, parameters in the same memory, no hook, the same plain settings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from mixtura.hf.forward import is_own_hook

_PLAIN = (bool, int, float, str)
_WITHOUT_SETTINGS = (nn.Linear, nn.Embedding, nn.ModuleList)


class Unchanged:
    """A record of a model, and what differs from it later. Looking is done at every token, so it compares by the dozen.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = [(m._modules, [*m._modules.values()]) for m in self._modules if m._modules]
        dicts = [tensors for m in self._modules for tensors in (m._parameters, m._buffers) if tensors]
        self._tensors = [(tensors, [*tensors.values()]) for tensors in dicts]
        self._memory = [tensor for tensors in dicts for tensor in tensors.values() if tensor is not None]
        self._pointers = list(map(torch.Tensor.data_ptr, self._memory))
        named = [(vars(m), _names(m)) for m in self._modules if type(m) not in _WITHOUT_SETTINGS]
        self._settings = [(now, names, dict(now)) for now, names in named if names]
        self._read = [(now, operator.itemgetter(*names)) for now, names, _ in self._settings]
        self._values = [read(now) for now, read in self._read]
        self._specs = [(m, m.spec) for m in self._modules if hasattr(m, "spec")]
        self._hooks = -1

    def difference(self) -> str:
        """What has changed, in words; "" if nothing has."""
        if not all(_same(children, seen) for children, seen in self._children):
            return "its modules were exchanged"
        same = all(_same(tensors, seen) for tensors, seen in self._tensors)
        if not same or list(map(torch.Tensor.data_ptr, self._memory)) != self._pointers:
            return "its tensors were exchanged"
        if [read(now) for now, read in self._read] != self._values:
            changed = [name for now, names, seen in self._settings for name in names if now[name] != seen[name]]
            return f"its setting {changed[0]} was changed"
        if any(module.spec is not spec for module, spec in self._specs):
            return "how its routers select was changed"
        return self._hooked()

    def _hooked(self) -> str:
        inner = self._modules[1:]  # those of the model itself are called whatever its forward does
        count = sum([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner])
        if count != self._hooks:
            for module in inner:
                for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                    if not is_own_hook(hook):
                        return f"a hook is on its {type(module).__name__}"
            self._hooks = count
        return ""


def _names(module: nn.Module) -> list[str]:
    """Names of the plain settings of a module."""
    plain = [name for name, value in vars(module).items() if type(value) in _PLAIN and not name.startswith("_")]
    return [name for name in plain if name != "training"]


def _same(now: dict[str, Any], seen: list[Any]) -> bool:
    """Whether the values are the very objects that were seen."""
    return len(now) == len(seen) and all(map(operator.is_, now.values(), seen))
