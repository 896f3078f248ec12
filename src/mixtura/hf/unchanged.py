"""Whether a model is what it was: modules, classes and methods, memory of parameters, hooks, plain settings.

Settings are those of modules and of the configuration.
"""

from __future__ import annotations

import inspect
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
        self._classes = list(map(type, self._modules))
        self._insides = list(map(vars, self._modules[1:]))  # the model's own methods are not called by a step
        self._sizes: list[int] = []
        self._children = [(m._modules, [*m._modules.values()]) for m in self._modules if m._modules]
        dicts = [tensors for m in self._modules for tensors in (m._parameters, m._buffers) if tensors]
        self._tensors = [(tensors, [*tensors.values()]) for tensors in dicts]
        self._memory = [tensor for tensors in dicts for tensor in tensors.values() if tensor is not None]
        self._pointers = list(map(torch.Tensor.data_ptr, self._memory))
        with_settings = [m for m in self._modules if type(m) not in _WITHOUT_SETTINGS]
        configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
        named = [(vars(one), _names(one)) for one in (*with_settings, *configs.values())]
        self._settings = [(now, names, dict(now)) for now, names in named if names]
        self._read = [(now, operator.itemgetter(*names)) for now, names, _ in self._settings]
        self._values = [read(now) for now, read in self._read]
        self._specs = [(m, m.spec) for m in self._modules if hasattr(m, "spec")]
        self._hooks = -1

    def difference(self) -> str:
        """What has changed, in words; "" if nothing has."""
        if not all(_same(children, seen) for children, seen in self._children):
            return "its modules were exchanged"
        if list(map(type, self._modules)) != self._classes:
            return "the class of one of its modules was exchanged"
        same = all(_same(tensors, seen) for tensors, seen in self._tensors)
        if not same or list(map(torch.Tensor.data_ptr, self._memory)) != self._pointers:
            return "its tensors were exchanged"
        if setting := self._changed_setting():
            return f"its setting {setting} was changed"
        if any(module.spec is not spec for module, spec in self._specs):
            return "how its routers select was changed"
        return self._exchanged_method() or self._hooked()

    def _changed_setting(self) -> str:
        try:
            if [read(now) for now, read in self._read] == self._values:
                return ""
        except KeyError:
            pass  # one was deleted
        gone = object()
        return next(name for now, names, seen in self._settings for name in names if now.get(name, gone) != seen[name])

    def _exchanged_method(self) -> str:
        """Looks closely only where a module has got or lost an attribute of its own."""
        sizes = list(map(len, self._insides))
        if sizes != self._sizes:
            for inside, cls in zip(self._insides, self._classes[1:], strict=True):
                for name, value in inside.items():
                    if callable(value) and inspect.isfunction(getattr(cls, name, None)):
                        return f"{name} of its {cls.__name__} was exchanged"
            self._sizes = sizes
        return ""

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


def _names(one: Any) -> list[str]:
    """Names of the plain settings of a module or a configuration."""
    plain = [name for name, value in vars(one).items() if type(value) in _PLAIN and not name.startswith("_")]
    return [name for name in plain if name != "training"]


def _same(now: dict[str, Any], seen: list[Any]) -> bool:
    """Whether the values are the very objects that were seen."""
    return len(now) == len(seen) and all(map(operator.is_, now.values(), seen))
