"""What every tensor of a model is for, found by structure.

Our mixtures are known by their class, native ones as the module that has ``experts``; beside them stands a ``gate`` or
``router``, and what else is there works on every token and is shared. A norm or a bias of theirs belongs to routers and
experts. The rest of a decoder layer is told by its place: norms by their class, the dense feed-forward by the names
that it has in transformers, and what mixes tokens ("attention", also where it is recurrent or a convolution) is what
remains.

E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mixtura.hf.frozen_rows import frozen_rows
from mixtura.hf.native import ROUTER_NAMES
from mixtura.hf.sites import decoder_layers
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture

_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc\d$|^wi|^wo$")


class TensorRole(NamedTuple):
    """One parameter or buffer.

    Attributes:
        name: as ``named_parameters`` or ``named_buffers`` gives it.
        tensor: itself.
        module: that owns it, under the last part of its name.
        role: one of ``mixtura.core.roles.ROLES``.
        layer: number of its decoder layer; None outside of them.
        experts: experts whose weights it stacks along its first axis; None if it is of none or common to all.
        num_experts: E of its mixture; None outside of the experts.
        adapter: whether PEFT added it.
    """

    name: str
    tensor: torch.Tensor
    module: nn.Module
    role: str
    layer: int | None
    experts: range | None
    num_experts: int | None
    adapter: bool

    @property
    def units(self) -> range:
        """What can be frozen by itself: experts, or the whole as number 0."""
        return range(1) if self.experts is None else self.experts

    @property
    def frozen(self) -> frozenset[int]:
        """Units that are not trained."""
        if not self.tensor.requires_grad:
            return frozenset(self.units)
        rows = frozen_rows(self.module, self.name.rpartition(".")[2])
        return frozenset(self.units[row] for row in rows)


def parameter_roles(model: nn.Module) -> list[TensorRole]:
    """Every parameter with what it is for, in the order of ``named_parameters``; tied ones once.

    Raises:
        NotExpressibleError: if the model has no decoder layers.
    """
    marks = _Marks(model)
    return [marks.role(name, parameter) for name, parameter in model.named_parameters()]


def buffer_roles(model: nn.Module) -> list[TensorRole]:
    """Every buffer that is saved, likewise."""
    marks, saved = _Marks(model), model.state_dict(keep_vars=True).keys()
    return [marks.role(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def coded_buffers(model: nn.Module) -> list[TensorRole]:
    """Buffers that stand for weights: quantizers keep their codes in matrices of whole numbers."""
    return [role for role in buffer_roles(model) if is_code(role.tensor) and role.tensor.ndim > 1]


def is_code(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds codes of a quantizer, or other whole numbers, instead of weights."""
    return not tensor.is_floating_point() and not tensor.is_complex()


class _Marks:
    """Modules whose place says what their parameters are for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.roles: dict[int, str] = {}
        self.experts: dict[int, tuple[range, int]] = {}
        self.layers = {id(layer): number for number, layer in enumerate(decoder_layers(model))}
        self.adapters = set(getattr(model, "peft_config", {}))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                self.roles[id(module)] = "embeddings"
        for role, get in (("head", "get_output_embeddings"), ("embeddings", "get_input_embeddings")):
            self._mark(role, getattr(model, get, lambda: None)())
        for module in [*model.modules()]:
            self._mark_mixture(module)

    def _mark(self, role: str, *modules: Any) -> None:
        self.roles |= {id(module): role for module in modules if isinstance(module, nn.Module)}

    def _mark_mixture(self, module: nn.Module) -> None:
        if isinstance(module, Mixture):
            self._mark("shared", module)
            self._mark("routers", module.router)
            self._mark("experts", module.experts)
            self._mark_stacks(module.experts)
        elif "experts" in module._modules and id(module) not in self.roles:
            children = dict(module.named_children())
            self._mark("routers", module)  # a bias of the selection may lie in the block itself
            self._mark("shared", *children.values())
            self._mark("routers", *(children.get(name) for name in ROUTER_NAMES))
            self._mark("experts", children["experts"])
            self._mark_stacks(_unwrapped(children["experts"]))

    def _mark_stacks(self, experts: nn.Module) -> None:
        """Note which experts each module holds."""
        forms = experts.forms if isinstance(experts, ExpertGroup) else [experts]
        number = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)
        if isinstance(experts, nn.ModuleList):
            self.experts |= {id(expert): (range(e, e + 1), len(experts)) for e, expert in enumerate(experts)}
        elif isinstance(number, int):
            first = 0
            for form in forms:
                E = int(form.num_experts)
                self.experts[id(form)] = (range(first, first + E), number)
                first += E

    def role(self, name: str, tensor: torch.Tensor) -> TensorRole:
        path = list(_along(self.model, name))
        layer = next((self.layers[id(module)] for _, module in path if id(module) in self.layers), None)
        held, number = next((self.experts[id(m)] for _, m in path if id(m) in self.experts), (None, None))
        stacked = held is not None and (len(held) == 1 or (tensor.ndim > 0 and len(tensor) == len(held)))
        adapter = not self.adapters.isdisjoint(name.split("."))
        experts = held if stacked and not adapter else None
        role = self._role(path, layer is not None)
        return TensorRole(name, tensor, path[-1][1], role, layer, experts, number, adapter)

    def _role(self, path: Sequence[tuple[str, nn.Module]], in_layer: bool) -> str:
        marks = [self.roles[id(module)] for _, module in path if id(module) in self.roles]
        if marks:
            return marks[-1]
        if "norm" in type(path[-1][1]).__name__.lower():
            return "norms"
        if not in_layer:
            return "other"
        names = [name for name, module in path if id(module) not in self.layers]
        if any("shared" in name for name in names):
            return "shared"
        return "feed-forward" if any(_FEED_FORWARD.search(name) for name in names) else "attention"


def _along(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules from the model to the owner of a parameter, each with its last name."""
    yield "", model
    module = model
    for part in name.split(".")[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
        yield part, module


def _unwrapped(module: nn.Module) -> nn.Module:
    """What PEFT wrapped."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module
