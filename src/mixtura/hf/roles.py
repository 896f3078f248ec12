"""What every parameter of a model is for, and ``freeze`` by that.

An expression names a role, some layers, or a role in some layers:

    "routers"  "experts"  "shared"  "mixtures" (all three)  "feed-forward" (the dense ones)  "attention"  "norms"
    "embeddings"  "head"  "adapters" (of PEFT)  "other"  "all"
    "layers[24:30]"  "layers[-1]"  "layers[24:30].routers"
    "experts[3]"  "experts[0:4]"  "layers[2].experts[0:4]"

Indices are Python's, without a step; in every layer that is meant the named experts must exist. Roles are found by
structure: our mixtures by their class, native ones as the module that has ``experts`` (beside them a ``gate`` or
``router``; what else is there works on every token and is shared), the rest of a decoder layer by its place. A norm or
a bias of theirs belongs to routers and experts. Experts lie side by side in one stack: to freeze some of them holds
their rows, see ``mixtura.hf.frozen_rows``; what the experts of a layer share is no part of one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError, unknown_name
from mixtura.hf.frozen_rows import frozen_rows, hold_rows
from mixtura.hf.sites import decoder_layers
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture

MIXTURES = ("routers", "experts", "shared")
ROLES = (*MIXTURES, "feed-forward", "attention", "norms", "embeddings", "head", "other")
NAMES = (*ROLES, "mixtures", "adapters", "layers", "all")

_PART = re.compile(r"([a-z-]+)(?:\[(-?\d+)?(?:(:)(-?\d+)?)?\])?")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc\d$|^wi|^wo$")
_ROUTER_NAMES = ("gate", "router")


class ParameterRole(NamedTuple):
    """One parameter.

    Attributes:
        name: as ``named_parameters`` gives it.
        parameter: itself.
        module: that owns it, under the last part of its name.
        role: one of ``ROLES``.
        layer: number of its decoder layer; None outside of them.
        experts: experts whose weights it stacks along its first axis; None if it is of none or common to all.
        num_experts: E of its mixture; None outside of the experts.
        adapter: whether PEFT added it.
    """

    name: str
    parameter: nn.Parameter
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
        if not self.parameter.requires_grad:
            return frozenset(self.units)
        rows = frozen_rows(self.module, self.name.rpartition(".")[2])
        return frozenset(self.units[row] for row in rows)


def freeze(model: nn.Module, what: str | Iterable[str]) -> list[str]:
    """Keep parameters from being trained; experts of a stack too, bit for bit under any optimizer of torch.

    Args:
        model: of transformers or of the family, dense or with mixtures, also under PEFT.
        what: one expression or several, see the head of the file.

    Returns:
        Names of the parameters that changed; one of which only some experts froze is among them.

    Raises:
        UnknownNameError: for an unknown role, with the nearest.
        OptionError: if an expression cannot be read, an index is out of range, or nothing fits.
        NotExpressibleError: if single experts are named, but lie in one adapter together.

    Example:
        >>> freeze(model, "all")
        >>> unfreeze(model, ["layers[24:30].routers", "experts[4:6]"])
    """
    return _change(model, what, lambda old, named: old | named)


def unfreeze(model: nn.Module, what: str | Iterable[str]) -> list[str]:
    """Let parameters be trained again; the counterpart of ``freeze``, with its arguments and errors.

    Raises:
        OptionError: also if a parameter is quantized, so that it cannot have a gradient.
    """
    return _change(model, what, lambda old, named: old - named)


def parameter_roles(model: nn.Module) -> list[ParameterRole]:
    """Every parameter with what it is for, in the order of ``named_parameters``; tied ones once.

    Raises:
        NotExpressibleError: if the model has no decoder layers.
    """
    marks = _Marks(model)
    return [marks.role(name, parameter) for name, parameter in model.named_parameters()]


def parse(expression: str) -> tuple[tuple[str, int | slice | None], ...]:
    """The parts of an expression: names with what stands in their brackets.

    Raises:
        UnknownNameError: for an unknown role, with the nearest.
        OptionError: if it cannot be read.
    """
    parts = []
    for text in expression.split(".") if isinstance(expression, str) else [""]:
        match = _PART.fullmatch(text)
        if match is None or (text.endswith("[]")):
            raise OptionError(f"a role is written as 'routers', 'layers[2:4]' or 'experts[3]', got {expression!r}")
        name, first, colon, last = match.groups()
        if name not in NAMES:
            raise unknown_name("role", name, NAMES)
        index = slice(*(None if bound is None else int(bound) for bound in (first, last))) if colon else first
        parts.append((name, int(index) if isinstance(index, str) else index))
    _check_parts(expression, parts)
    return tuple(parts)


def _check_parts(expression: str, parts: Sequence[tuple[str, int | slice | None]]) -> None:
    for name, index in parts:
        if index is not None and name not in ("layers", "experts"):
            raise OptionError(f"only layers and experts have numbers, got {expression!r}")
    if len(parts) > 2 or (len(parts) == 2 and (parts[0][0] != "layers" or parts[1][0] in ("layers", "all"))):
        raise OptionError(f"two parts are 'layers[...]' and a role in them, got {expression!r}")


def _change(
    model: nn.Module, what: str | Iterable[str], combine: Callable[[frozenset[int], frozenset[int]], frozenset[int]]
) -> list[str]:
    roles = parameter_roles(model)
    layers = len(decoder_layers(model))
    named: dict[str, frozenset[int]] = {}
    for expression in [what] if isinstance(what, str) else what:
        for role, units in _match(expression, roles, layers):
            named[role.name] = named.get(role.name, frozenset()) | units
    wanted = {role: combine(role.frozen, named[role.name]) for role in roles if role.name in named}
    changed = {role: units for role, units in wanted.items() if units != role.frozen}
    for role, units in changed.items():
        if len(units) < len(role.units) and not role.parameter.is_floating_point():
            raise OptionError(f"{role.name} is of {role.parameter.dtype}: quantized weights cannot be trained")
    for role, units in changed.items():
        _hold(role, units)
    return [role.name for role in changed]


def _hold(role: ParameterRole, units: frozenset[int]) -> None:
    attribute = role.name.rpartition(".")[2]
    whole = len(units) == len(role.units)
    hold_rows(role.module, attribute, ())
    role.parameter.requires_grad_(not whole)
    if whole:
        role.parameter.grad = None  # an optimizer would still follow what was accumulated
    else:
        hold_rows(role.module, attribute, tuple(sorted(role.units.index(unit) for unit in units)))


def _match(expression: str, roles: Sequence[ParameterRole], layers: int) -> list[tuple[ParameterRole, frozenset[int]]]:
    parts = dict(parse(expression))
    inside = roles
    if "layers" in parts:
        chosen = _chosen(parts.pop("layers"), layers, expression, "layers")
        inside = [role for role in roles if role.layer in chosen]
    name, index = next(iter(parts.items()), ("all", None))
    fitting = [role for role in inside if _has_role(role, name)]
    if index is not None:
        found = list(_slices(fitting, index, expression))
    else:
        found = [(role, frozenset(role.units)) for role in fitting]
    if not found:
        raise OptionError(f"{expression!r} names no parameter; {_existing(inside, roles)}")
    return found


def _has_role(role: ParameterRole, name: str) -> bool:
    if name in ("mixtures", "adapters"):
        return role.role in MIXTURES if name == "mixtures" else role.adapter
    return name in ("all", role.role)


def _slices(
    experts: Sequence[ParameterRole], index: int | slice, expression: str
) -> Iterator[tuple[ParameterRole, frozenset[int]]]:
    """Those of the experts that are numbered, stack by stack."""
    stacked = {role.layer for role in experts if role.experts is not None}
    for role in experts:
        where = f"experts of layer {role.layer}"
        if role.adapter:
            raise NotExpressibleError(f"{expression!r}: the {where} share the adapter {role.name}; name them all")
        if role.num_experts is None or role.layer not in stacked or (role.experts is None and role.parameter.ndim > 2):
            raise NotExpressibleError(f"{expression!r}: the {where} are not stacked expert by expert in {role.name}")
        units = frozenset(_chosen(index, role.num_experts, expression, where)) & frozenset(role.experts or ())
        if units:
            yield role, units


def _chosen(index: int | slice | None, number: int, expression: str, what: str) -> range:
    if index is None:
        return range(number)
    bounds = [index] if isinstance(index, int) else [index.start, index.stop]
    if isinstance(index, int):
        fits, chosen = -number <= index < number, range(number)[slice(index, index + 1 or None)]
    else:
        fits = all(bound is None or -number <= bound <= number for bound in bounds)
        chosen = range(number)[index]
    if not fits or not chosen:
        raise OptionError(f"{expression!r} is out of range: the {what} are 0 .. {number - 1}")
    return chosen


def _existing(inside: Sequence[ParameterRole], roles: Sequence[ParameterRole]) -> str:
    found = dict.fromkeys(role.role for role in inside) | dict.fromkeys("adapters" for r in inside if r.adapter)
    tied = "" if any(role.role == "head" for role in roles) else " (a head that is tied is among the embeddings)"
    return f"there are {', '.join(found) or 'none'}{tied}"


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
            self._mark("routers", *(children.get(name) for name in _ROUTER_NAMES))
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

    def role(self, name: str, parameter: nn.Parameter) -> ParameterRole:
        path = list(_along(self.model, name))
        layer = next((self.layers[id(module)] for _, module in path if id(module) in self.layers), None)
        held, number = next((self.experts[id(m)] for _, m in path if id(m) in self.experts), (None, None))
        stacked = held is not None and (len(held) == 1 or (parameter.ndim > 0 and len(parameter) == len(held)))
        adapter = not self.adapters.isdisjoint(name.split("."))
        experts = held if stacked and not adapter else None
        role = self._role(path, layer is not None)
        return ParameterRole(name, parameter, path[-1][1], role, layer, experts, number, adapter)

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
