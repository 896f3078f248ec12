"""Whether a model is what it was: the same modules, parameters in the same memory, no hook, the same plain settings."""

from __future__ import annotations

from torch import nn

from mixtura.hf.forward import is_own_hook

_PLAIN = (bool, int, float, str)
_WITHOUT_SETTINGS = (nn.Linear, nn.Embedding, nn.ModuleList)


class Unchanged:
    """A record of a model, and what differs from it later; looking takes some 0.1 ms.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._tensors = [
            (tensors, name, tensor, tensor.data_ptr())
            for m in modules
            for tensors in (m._parameters, m._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._settings = [
            (vars(m), name, value)
            for m in modules
            if type(m) not in _WITHOUT_SETTINGS
            for name, value in vars(m).items()
            if type(value) in _PLAIN and name != "training" and not name.startswith("_")
        ]
        self._specs = [(m, m.spec) for m in modules if hasattr(m, "spec")]
        self._hooks = -1

    def difference(self) -> str:
        """What has changed, in words; "" if nothing has."""
        if any(children.get(name) is not child for children, name, child in self._children):
            return "its modules were exchanged"
        for tensors, name, tensor, pointer in self._tensors:
            if tensors.get(name) is not tensor or tensor.data_ptr() != pointer:
                return f"its tensor {name} was exchanged"
        for settings, name, value in self._settings:
            if settings.get(name) != value:
                return f"its setting {name} was changed"
        if any(module.spec is not spec for module, spec in self._specs):
            return "how its routers select was changed"
        return self._hooked()

    def _hooked(self) -> str:
        inner = self._modules[1:]  # those of the model itself are called whatever its forward does
        count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner)
        if count != self._hooks:
            for module in inner:
                for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                    if not is_own_hook(hook):
                        return f"a hook is on its {type(module).__name__}"
            self._hooks = count
        return ""
