"""``RouterState``: what one forward call of a model knows beyond the token, and the tape of its routings.

A model that holds mixtures opens one state per forward call (``mixtura.hf`` does it by a pre-hook on the base model).
Routers and mixtures find it by ``current_state()``; outside of a model there is none and nothing is recorded. Under
activation checkpointing ``checkpoint_context`` gives each recomputation the state of its own forward, also when two
forwards precede one backward; what is recomputed is not recorded again, but edited again.

T tokens: B sequences of Q positions flattened, row by row. E experts.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch

from mixtura.core.routing import Routing


class Record(NamedTuple):
    """One mixture's decision in one forward call."""

    layer: str
    routing: Routing


Edit: TypeAlias = Callable[["RouterState", str, Routing], Routing]


@dataclasses.dataclass
class Tape:
    """The decisions of one forward call, in the order of the layers."""

    records: list[Record] = dataclasses.field(default_factory=list)

    def write(self, layer: str, routing: Routing) -> None:
        """Append one decision."""
        self.records.append(Record(layer, routing))

    def before(self, layer: str) -> Routing | None:
        """What the mixture before that one decided in this call, None for the first; also while it is run again."""
        names = [record.layer for record in self.records]
        place = names.index(layer) if layer in names else len(names)
        return self.records[place - 1].routing if place else None


@dataclasses.dataclass
class RouterState:
    """One forward call.

    Attributes:
        mask_T: True where a token is real, False for padding; None if all are.
        token_T: ids of the tokens; None if the model was given embeddings.
        rows: B, sequences of the call.
        past: positions that the cache held before this call.
        edits: change each decision before it is recorded and carried out: (state, layer, routing) -> routing.
        tape: what was decided.
        differentiable: whether the call was made with gradients enabled.
        layer: the mixture that is deciding.
        logits_TE: of a router whose experts are called next; None where decisions come whole.
        recomputing: True while activation checkpointing runs a layer again.
    """

    mask_T: torch.Tensor | None = None
    token_T: torch.Tensor | None = None
    rows: int = 1
    past: int = 0
    edits: list[Edit] = dataclasses.field(default_factory=list)
    tape: Tape = dataclasses.field(default_factory=Tape)
    differentiable: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    layer: str = ""
    logits_TE: torch.Tensor | None = None
    recomputing: bool = False

    def decide(self, layer: str, routing: Routing) -> Routing:
        """The routing that is carried out in a layer: edited, and on the tape unless it is a recomputation."""
        for edit in self.edits:
            routing = edit(self, layer, routing)
        if not self.recomputing:
            self.tape.write(layer, routing)
        return routing


_CURRENT: contextvars.ContextVar[RouterState | None] = contextvars.ContextVar("mixtura_state", default=None)


def current_state() -> RouterState | None:
    """The state of the forward call that is running, or None outside of one."""
    return _CURRENT.get()


@contextlib.contextmanager
def use_state(state: RouterState | None) -> Iterator[RouterState | None]:
    """Make ``state`` the current one inside the ``with``."""
    token = _CURRENT.set(state)
    try:
        yield state
    finally:
        _CURRENT.reset(token)


def set_state(state: RouterState | None) -> None:
    """Make ``state`` the current one until the next call; for hooks, which cannot hold a ``with`` open."""
    _CURRENT.set(state)


def checkpoint_context() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: recomputation sees the state of its own forward."""
    return contextlib.nullcontext(), _Recompute(current_state())


class _Recompute(contextlib.AbstractContextManager[None]):
    """Recomputation of one forward; entered once for every backward through it, as a generator could not be."""

    def __init__(self, state: RouterState | None) -> None:
        self.state = state

    def __enter__(self) -> None:
        self._token = _CURRENT.set(self.state)
        if self.state is not None:
            self.state.recomputing = True

    def __exit__(self, *_: object) -> None:
        if self.state is not None:
            self.state.recomputing = False
        _CURRENT.reset(self._token)
