"""What ``doctor`` finds wrong with a model: sentences that name the tensor, what was seen and what to do.

U units of a tensor: its experts, or all of it as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mixtura.hf.balance import constant_routers
from mixtura.hf.doctor_probe import Probe
from mixtura.hf.native import native_mixtures
from mixtura.hf.stored import Stored
from mixtura.hf.tensor_roles import TensorRole, buffer_roles, coded_buffers, is_code, parameter_roles

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
_SHOWN = 3  # names in one finding


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence on what was seen and what to do.

    Attributes:
        level: "error": the model cannot be trusted; "warning": it works, but hardly as one would wish; "note".
        text: names the tensor or layer.
    """

    level: Level
    text: str


def findings(
    model: Any, *, seen: Probe | None, stored: Stored | None, fresh: bool, export: Mapping[str, str]
) -> list[Finding]:
    """Everything that is wrong or worth knowing, the worst first.

    Args:
        model: that was examined.
        seen: its backward call.
        stored: the comparison with its files.
        fresh: whether it was just loaded from them, so that values have to be equal.
        export: for each stock family what it lacks.
    """
    roles = parameter_roles(model)
    there = all(not role.tensor.is_meta for role in roles)
    found = [
        *_on_files(stored, fresh),
        *(_on_values([*roles, *buffer_roles(model)]) if there else ()),
        *_on_quantization([*roles, *coded_buffers(model)]),
        *(_on_gradients(roles, seen) if seen is not None else ()),
        *_on_routers(model, seen),
        *_on_export(export),
    ]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _on_files(stored: Stored | None, fresh: bool) -> Iterator[Finding]:
    if stored is None:
        return
    if stored.missing:
        yield Finding("error", f"the files lack {_some(stored.missing)}: loading would draw them anew; get whole files")
    for name, (file, ours) in list(stored.mismatched.items())[:_SHOWN]:
        yield Finding("error", f"{name} has shape {file} in the files and {ours} in the model: it is not loaded")
    if stored.unexpected:
        yield Finding("warning", f"the files hold {_some(stored.unexpected)}, for which the model has no place")
    if stored.differing:
        what = "were not loaded as they are" if fresh else "are others than in the files (trained since, or not loaded)"
        yield Finding("error" if fresh else "note", f"values of {_some(stored.differing)} {what}")


def _on_values(roles: Iterable[TensorRole]) -> Iterator[Finding]:
    """NaN, infinities, and weights that are 0."""
    wrong: dict[str, list[str]] = {"NaN": [], "infinite": [], "0": []}
    for role in roles:
        if is_code(role.tensor):
            continue
        values_U = role.tensor.detach()
        values_U = values_U.flatten(1) if len(role.units) > 1 else values_U.reshape(1, -1)
        seen = {"NaN": values_U.isnan().any(1), "infinite": values_U.isinf().any(1)}
        stacked = role.experts is not None and len(role.tensor) == len(role.experts)
        if role.tensor.ndim - stacked > 1 and not role.adapter:  # biases begin with 0, so does a factor of an adapter
            seen["0"] = ~values_U.any(1)
        for what, where_U in seen.items():
            if units := [role.units[row] for row in where_U.nonzero().flatten().tolist()]:
                wrong[what].append(_place(role, units))
    for what in ("NaN", "infinite"):
        if wrong[what]:
            yield Finding("error", f"{what} in {_some(wrong[what])}: load or train it again")
    if wrong["0"]:
        yield Finding("warning", f"all is 0 in {_some(wrong['0'])}: dead, unless that is meant")


def _place(role: TensorRole, units: Iterable[int]) -> str:
    return role.name if role.experts is None else f"expert {ranges(units)} of {role.name}"


def _on_quantization(roles: Sequence[TensorRole]) -> Iterator[Finding]:
    coded = {role.role for role in roles if is_code(role.tensor)}
    whole = [role for role in roles if role.role == "experts" and not is_code(role.tensor)]
    if coded and whole and "experts" not in coded:
        size = sum(role.tensor.nbytes for role in whole) / 1e6
        yield Finding(
            "warning",
            f"{', '.join(sorted(coded))} are quantized, but the experts are {whole[0].tensor.dtype} ({size:,.1f} MB), "
            f"as {whole[0].name}: the quantizer did not see stacked experts; use one that does",
        )


def _on_gradients(roles: Sequence[TensorRole], seen: Probe) -> Iterator[Finding]:
    trained = [role for role in roles if role.tensor.requires_grad]
    if not trained:
        yield Finding("note", "every parameter is frozen: nothing would be trained; unfreeze some")
        return
    if not seen.loss < float("inf"):
        yield Finding(
            "error", f"the loss is {seen.loss} on {seen.tokens} random tokens: look for NaN among the weights"
        )
        return
    if seen.infinite:
        yield Finding("error", f"the gradient of {_some(seen.infinite)} is not finite; use a wider type")
    yield from _on_dead_experts(trained, seen)
    rest = [role for role in trained if role.experts is None]
    unreached = [role.name for role in rest if role.name not in seen.live]
    if unreached:
        yield Finding("warning", f"no gradient reaches {_some(unreached)}: nothing that is computed depends on them")
    zero = [role for role in rest if role.name in seen.live and not seen.live[role.name]]
    if waiting := [role.name for role in zero if role.adapter]:
        yield Finding("note", f"the gradient of {_some(waiting)} is 0, as it is while the factor beside them is 0")
    if routers := [role.name for role in zero if role.role == "routers" and not role.adapter]:
        yield Finding("warning", f"the gradient of {_some(routers)} is 0: the loss does not depend on the router")
    others = [role for role in zero if not role.adapter and role.role != "routers"]
    if others:  # a bias of keys never has one: it adds the same to every score of a query
        level: Level = "warning" if any(role.tensor.ndim > 1 for role in others) else "note"
        names = _some([role.name for role in others])
        yield Finding(level, f"the gradient of {names} is 0 on {seen.tokens} random tokens")


def _on_dead_experts(trained: Sequence[TensorRole], seen: Probe) -> Iterator[Finding]:
    """Experts of which no tensor has a gradient, with the reason."""
    wanted: dict[int, set[int]] = {}
    alive: dict[int, set[int]] = {}
    for role in trained:
        if role.experts is not None and role.layer is not None:
            wanted.setdefault(role.layer, set()).update(set(role.units) - role.frozen)
            alive.setdefault(role.layer, set()).update(seen.live.get(role.name, ()))
    unchosen, silent = [], []
    for layer, experts in wanted.items():
        chosen_E = seen.chosen_E.get(str(layer))
        dead = experts - alive[layer]
        idle = {e for e in dead if chosen_E is not None and not chosen_E[e]}
        unchosen += [f"layer {layer} expert {ranges(idle)}"] if idle else []
        silent += [f"layer {layer} expert {ranges(dead - idle)}"] if dead - idle else []
    if unchosen:
        yield Finding(
            "warning",
            f"none of {seen.tokens} random tokens chose {_some(unchosen)}, so no gradient; if text does not either "
            "(mixtura inspect), remove or revive them",
        )
    if silent:
        yield Finding("warning", f"{_some(silent)}: run, but without gradient; nothing depends on what they answer")


def _on_routers(model: Any, seen: Probe | None) -> Iterator[Finding]:
    if constant := constant_routers(model):
        yield Finding(
            "warning",
            f"layer {', '.join(constant)}: a renormalized top-1 gate is constant 1 and gets no gradient from the "
            "loss; use renormalize=None or k >= 2",
        )
    gates = {str(role.layer) for role in parameter_roles(model) if role.role == "routers" and role.tensor.requires_grad}
    reached = {} if seen is None else seen.gate_reached
    cut = [layer for layer, there in reached.items() if not there and layer.split(".")[0] in gates]
    if cut:
        yield Finding(
            "warning", f"layer {', '.join(cut)}: no balance loss can reach the router, whose logits have no gradient"
        )
    coefficient = getattr(model.config, "router_aux_loss_coef", 0)
    if coefficient and native_mixtures(model) and not getattr(model.config, "output_router_logits", True):
        yield Finding(
            "note",
            f"router_aux_loss_coef is {coefficient}, but transformers adds no balance loss while "
            "config.output_router_logits is False",
        )


def _on_export(export: Mapping[str, str]) -> Iterator[Finding]:
    if export and all(export.values()):
        yield Finding(
            "note", "no stock family can hold this model, so only mixtura can load it; see mixtura export --check"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def ranges(numbers: Iterable[int]) -> str:
    """``"0-3, 7"`` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
