"""``steer``: a model with other decisions inside of a ``with``; nothing of it is changed.

Decisions are made again from the router's logits, by the layer's own ``SelectionSpec`` and selection bias: what is not
asked for stays as the model does it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mixtura.core.errors import NotExpressibleError, unknown_name
from mixtura.core.routing import Routing
from mixtura.hf.forward import Listener, listen
from mixtura.hf.selection import LayerSelection, layer_selections
from mixtura.hf.sites import decoder
from mixtura.nn.state import RouterState
from mixtura.steering.plan import Plan

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[_Steering]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def steer(
    model: nn.Module,
    *,
    k: int | None = None,
    ranks: Sequence[int] | None = None,
    bias: Mapping[int, float] | None = None,
    off: Iterable[int] = (),
    force: Iterable[int] = (),
    layers: Iterable[str | int] | None = None,
) -> Iterator[None]:
    """Change the decisions of ``model`` inside of the ``with``.

    Calls nest: the innermost k or ranks counts, biases add up, experts that are off or forced are joined. Groups of
    experts (DeepSeek-V3) are chosen as ever, ``off`` then leaves fewer experts in them, and a slot for which none is
    left stays empty; ``force`` takes an expert also if its group was not chosen. Inside of ``replay`` the call that was
    entered last decides. A model that ``torch.export`` exports inside of the ``with`` keeps the changes.

    With k as the layer has it, a bias of 0, an expert off that is never chosen, or one forced that always is, no bit
    changes. In a model in half precision that holds as far as the family's own router scores in float32 and breaks ties
    by index.

    Args:
        model: with mixtures or routers of ours, or native ones.
        k: experts a token.
        ranks: places in the order of choice that are taken instead of the first ones; ``[2, 3]`` leaves out the two
            best.
        bias: by expert, added to the score that it is chosen by (the logit where a family chooses by logits); it never
            weighs.
        off: experts that are never chosen. Where a layer cannot select again, their slots stay empty and, if weights
            are normalized, the others get their weight.
        force: experts that are always chosen.
        layers: names or numbers of layers as in a trace; None for all.

    Raises:
        OptionError: for an expert or k that a layer has not, or changes that exclude each other.
        UnknownNameError: for an unknown layer.
        NotExpressibleError: if the model has no mixture, or a layer does not select from logits by a spec.

    Example:
        >>> with steer(model, off=[3], layers=["5"]), steer(model, k=1):
        ...     model.generate(**batch)
    """
    selections = layer_selections(model)
    if not selections:
        raise NotExpressibleError(f"{type(model).__name__} has no mixture that could be steered")
    plan = Plan(
        k,
        None if ranks is None else tuple(ranks),
        tuple((int(expert), float(value)) for expert, value in (bias or {}).items()),
        frozenset(off),
        frozenset(force),
    )
    active = _ACTIVE.setdefault(decoder(model), [])
    steering = _Steering(active, selections, _merged(active, dict.fromkeys(_named(layers, selections), plan)))
    for name, merged in steering.plans.items():
        merged.check(selections[name])
    active.append(steering)
    try:
        with listen(model, steering):
            yield
    finally:
        active.remove(steering)


class _Steering(Listener):
    """The plans of one ``steer`` and those around it; the innermost one decides."""

    def __init__(
        self, active: list[_Steering], selections: Mapping[str, LayerSelection], plans: Mapping[str, Plan]
    ) -> None:
        self.active, self.selections, self.plans = active, selections, plans
        self.checked: set[str] = set()

    def opened(self, state: RouterState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward call of the decoder begins."""
        if self.active[-1] is self:
            state.edits.append(self.edit)

    def edit(self, state: RouterState, layer: str, routing: Routing) -> Routing:
        """The decision of a layer by its plan."""
        plan, selection = self.plans.get(layer), self.selections[layer]
        if plan is None or not plan.changes(selection):
            return routing
        if layer not in self.checked and state.edits[0] == self.edit:  # the decision is the model's own
            selection.check(routing)
            self.checked.add(layer)
        return plan.decide(selection, state, routing)


def _merged(active: list[_Steering], plans: Mapping[str, Plan]) -> dict[str, Plan]:
    outer = active[-1].plans if active else {}
    return {name: outer.get(name, Plan()).then(plans.get(name, Plan())) for name in {**outer, **plans}}


def _named(layers: Iterable[str | int] | None, selections: Mapping[str, LayerSelection]) -> list[str]:
    names = list(selections) if layers is None else [str(layer) for layer in layers]
    for name in names:
        if name not in selections:
            raise unknown_name("layer", name, selections)
    return names
