"""``freeze`` and ``unfreeze``: parameters by what they are for.

What is named is an expression of ``mixtura.core.roles``:

    "routers"   "experts[0:4]"   "layers[24:30]"   "layers[2].experts[0:4]"   "attention"   "all"

Indices are Python's, without a step; in every layer that is meant the named experts must exist. What has which role is
told by ``mixtura.hf.tensor_roles``. Experts lie side by side in one stack: to freeze some of them holds their rows, see
``mixtura.hf.frozen_rows``; what the experts of a layer share is no part of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.roles import MIXTURES, parse
from mixtura.hf.frozen_rows import hold_rows
from mixtura.hf.sites import decoder_layers
from mixtura.hf.tensor_roles import TensorRole, parameter_roles


def freeze(model: nn.Module, what: str | Iterable[str]) -> list[str]:
    """Keep parameters from being trained; experts of a stack too, bit for bit under any optimizer of torch.

    Args:
        model: of transformers or of the family, dense or with mixtures, also under PEFT.
        what: one expression or several, see ``mixtura.core.roles``.

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
        if len(units) < len(role.units) and not role.tensor.is_floating_point():
            raise OptionError(f"{role.name} is of {role.tensor.dtype}: quantized weights cannot be trained")
    for role, units in changed.items():
        _hold(role, units)
    return [role.name for role in changed]


def _hold(role: TensorRole, units: frozenset[int]) -> None:
    attribute = role.name.rpartition(".")[2]
    whole = len(units) == len(role.units)
    hold_rows(role.module, attribute, ())
    role.tensor.requires_grad_(not whole)
    if whole:
        role.tensor.grad = None  # an optimizer would still follow what was accumulated
    else:
        hold_rows(role.module, attribute, tuple(sorted(role.units.index(unit) for unit in units)))


def _match(expression: str, roles: Sequence[TensorRole], layers: int) -> list[tuple[TensorRole, frozenset[int]]]:
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


def _has_role(role: TensorRole, name: str) -> bool:
    if name in ("mixtures", "adapters"):
        return role.role in MIXTURES if name == "mixtures" else role.adapter
    return name in ("all", role.role)


def _slices(
    experts: Sequence[TensorRole], index: int | slice, expression: str
) -> Iterator[tuple[TensorRole, frozenset[int]]]:
    """Those of the experts that are numbered, stack by stack."""
    stacked = {role.layer for role in experts if role.experts is not None}
    for role in experts:
        where = f"experts of layer {role.layer}"
        if role.adapter:
            raise NotExpressibleError(f"{expression!r}: the {where} share the adapter {role.name}; name them all")
        if role.num_experts is None or role.layer not in stacked or (role.experts is None and role.tensor.ndim > 2):
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


def _existing(inside: Sequence[TensorRole], roles: Sequence[TensorRole]) -> str:
    found = dict.fromkeys(role.role for role in inside) | dict.fromkeys("adapters" for r in inside if r.adapter)
    tied = "" if any(role.role == "head" for role in roles) else " (a head that is tied is among the embeddings)"
    return f"there are {', '.join(found) or 'none'}{tied}"
