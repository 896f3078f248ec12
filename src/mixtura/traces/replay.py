"""``replay``: a model decides as it is recorded in a trace, to the bit, or with weights that learn.

Two uses: to look at one decision with all others held (routing frozen while text, weights or precision change), and
rollout routing replay in reinforcement learning (R3, arXiv:2510.11370): the experts of the rollout, weighed by the
logits of the model that is trained, so that gradients reach its gates.

B rows of a call, Q positions of it, T = B Q tokens, K slots a token, E experts. S sequences, P positions.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError, ShapeError
from mixtura.core.routing import Routing
from mixtura.hf.caches import watch_caches
from mixtura.hf.forward import Listener, listen
from mixtura.hf.selection import LayerSelection, layer_selections
from mixtura.nn.state import RouterState
from mixtura.traces.sequences import Sequences, Tokens
from mixtura.traces.trace import Trace

Weights = Literal["recorded", "recomputed"]
By = Literal["call", "position"]


@contextlib.contextmanager
def replay(
    model: nn.Module,
    trace: Trace,
    *,
    weights: Weights = "recorded",
    by: By = "call",
    sequences: Sequence[int] | None = None,
) -> Iterator[None]:
    """Force the decisions of a trace on ``model`` inside of the ``with``.

    Logits, and so the balance losses that read them, stay those of the model.

    Args:
        model: with the same mixtures as the model that was captured; also under PEFT, DDP and torch.compile.
        trace: what ``capture`` made; weights are stored in float32, so a model in float64 gets them rounded.
        weights: "recorded" gives experts the weights of the trace, without gradient to the gates; "recomputed" weighs
            them by the logits of the model.
        by: "call" gives the n-th call of the decoder the n-th of the trace, row by row; "position" gives a token the
            last decision of its sequence and position, in whatever batches, padding and calls it comes. Padding decides
            by itself then.
        sequences: with ``by="position"``, the sequence of the trace that each row is, in the order in which rows begin;
            None is 0, 1, 2 ...

    Raises:
        OptionError: if the model has other layers or numbers of experts than the trace, or makes more calls.
        ShapeError: if a call has another number of rows or tokens than recorded, or a token is not in the trace.
        NotExpressibleError: if weights cannot be recomputed in a layer, or the model is exported.

    Example:
        >>> with capture(model) as trace, torch.no_grad():
        ...     rollout = model.generate(**prompts)
        >>> with replay(model, trace, weights="recomputed", by="position"):
        ...     loss = objective(model(rollout[:, :-1]))
    """
    for name, value, known in (("weights", weights, Weights), ("by", by, By)):
        if value not in get_args(known):
            raise OptionError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {value!r}")
    if sequences is not None and by != "position":
        raise OptionError("sequences need by='position'")
    selections = _fitting(model, trace)
    if weights == "recomputed":
        for selection in selections.values():
            selection.require("recomputing weights")
    rows = Sequences.of(model)
    source = _ByCall(trace, rows) if by == "call" else _ByPosition(trace, rows, sequences)
    player = _Player(selections, source, recomputed=weights == "recomputed")
    with listen(model, player), watch_caches(rows):
        yield
    if source.left():
        warnings.warn(f"replay: {source.left()}", MixturaWarning, stacklevel=3)


def _fitting(model: nn.Module, trace: Trace) -> dict[str, LayerSelection]:
    selections = layer_selections(model)
    seen = {name: selection.num_experts for name, selection in selections.items()}
    recorded = dict(zip(trace.layers, trace.meta["experts"], strict=True))
    if seen != recorded:
        raise OptionError(f"trace has the experts {recorded} by layer, but {type(model).__name__} has {seen}")
    return selections


class _Player(Listener):
    """Gives every call an edit of its own, so that recomputation meets the decisions of its call."""

    def __init__(
        self, selections: Mapping[str, LayerSelection], source: _ByCall | _ByPosition, recomputed: bool
    ) -> None:
        self.selections, self.source, self.recomputed = selections, source, recomputed

    def opened(self, state: RouterState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward call of the decoder begins."""
        if torch.compiler.is_exporting():
            raise NotExpressibleError("a model cannot be exported inside of replay: decisions belong to one text")
        tokens = self.source.sequences.open(args, kwargs)
        state.edits.append(functools.partial(self._force, self.source.decisions(tokens)))

    def _force(self, decisions: _Decisions, state: RouterState, layer: str, routing: Routing) -> Routing:
        indices, weights, given = decisions.of(layer)
        device = routing.indices_TK.device
        indices_TK = torch.from_numpy(indices).to(device)
        weights_TK = torch.from_numpy(weights).to(device, routing.weights_TK.dtype)
        if self.recomputed:
            made = self.selections[layer].weigh(routing, indices_TK, state)
        else:
            made = Routing(routing.logits_TE, weights_TK, indices_TK)
        return made if given.all() else _where(torch.from_numpy(given).to(device), made, routing)


class _Decisions:
    """What is forced in one call: of each layer indices and weights (T, K), and which tokens (T,) they are for."""

    def __init__(self, where: str, by_layer: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        self.where, self.by_layer = where, by_layer

    def of(self, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raises ``ShapeError`` if there is no decision of that layer."""
        if layer not in self.by_layer:
            raise ShapeError(f"{self.where} of the trace has no decision of layer {layer}")
        return self.by_layer[layer]


class _ByCall:
    """The n-th call gets the n-th of the trace."""

    def __init__(self, trace: Trace, sequences: Sequences) -> None:
        self.sequences = sequences
        order = np.argsort(trace.call, kind="stable")
        calls, starts = np.unique(trace.call[order], return_index=True)
        self.trace, self.calls = trace, list(zip(calls.tolist(), np.split(order, starts[1:]), strict=False))
        self.used = 0

    def decisions(self, tokens: Tokens) -> _Decisions:
        """Those of the next call."""
        if self.used == len(self.calls):
            raise OptionError(f"trace has {len(self.calls)} calls, but the model makes another")
        number, rows = self.calls[self.used]
        self.used += 1
        call, (B, Q) = self.trace.select(rows), tokens.token_BQ.shape
        seen = int(call.row.max()) + 1
        by_layer = {}
        for layer in self.trace.layers:
            _, weights_TK, indices_TK = call.routing(layer)
            if not len(indices_TK):
                continue
            if (seen, len(indices_TK)) != (B, B * Q):
                raise ShapeError(
                    f"call {number} of the trace has {len(indices_TK)} tokens in {seen} rows, but the model is given "
                    f"{B * Q} in {B}"
                )
            by_layer[layer] = (indices_TK, weights_TK, np.ones(B * Q, bool))
        return _Decisions(f"call {number}", by_layer)

    def left(self) -> str:
        """What was not used, in words."""
        return "" if self.used == len(self.calls) else f"{len(self.calls)} calls are recorded, {self.used} were made"


class _ByPosition:
    """Each token gets the last decision of its sequence and position."""

    def __init__(self, trace: Trace, sequences: Sequences, order: Sequence[int] | None) -> None:
        known = np.unique(trace.sequence).tolist()
        if order is not None and (unknown := sorted(set(order) - set(known))):
            raise OptionError(f"sequences must be of the {len(known)} of the trace, got {unknown[0]}")
        self.trace, self.sequences = trace.final(), sequences
        self.order: Sequence[int] = known if order is None else order
        self.recorded = functools.cache(self._recorded)

    def decisions(self, tokens: Tokens) -> _Decisions:
        """Those of the tokens of a call; padding has none."""
        given_T = tokens.valid_BQ.reshape(-1)
        by_layer = {}
        for layer, E in zip(self.trace.layers, self.trace.meta["experts"], strict=True):
            rows = [self._row(layer, tokens, row) for row in range(len(tokens.sequence_B))]
            K = max(indices_TK.shape[1] for indices_TK, _ in rows)
            indices_TK, weights_TK = np.full((len(given_T), K), E), np.zeros((len(given_T), K), np.float32)
            indices_TK[given_T] = np.concatenate([_wider(indices, K, E) for indices, _ in rows])
            weights_TK[given_T] = np.concatenate([_wider(weights, K, 0) for _, weights in rows])
            by_layer[layer] = (indices_TK, weights_TK, given_T)
        return _Decisions("the text", by_layer)

    def left(self) -> str:
        """Nothing needs to be used."""
        return ""

    def _row(self, layer: str, tokens: Tokens, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and weights of the real tokens of one row."""
        number = int(tokens.sequence_B[row])
        if number >= len(self.order):
            raise ShapeError(f"{len(self.order)} sequences are replayed, but the model is given another")
        sequence, position_T = self.order[number], tokens.position_BQ[row][tokens.valid_BQ[row]]
        place_P, indices_TK, weights_TK = self.recorded(layer, sequence)
        place_T = place_P[position_T.clip(max=len(place_P) - 1)]
        if (place_T < 0).any():
            missing = int(position_T[place_T < 0][0])
            raise ShapeError(f"position {missing} of sequence {sequence} is not in the trace, in layer {layer}")
        return indices_TK[place_T], weights_TK[place_T]

    def _recorded(self, layer: str, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decisions of a sequence, and where among them each position is; -1, at the end too, if it is not there."""
        path = self.trace.path(sequence).of_layer(layer)
        position_T, (_, weights_TK, indices_TK) = path.position[path.slot == 0], path.routing(layer)
        place_P = np.full(position_T.max(initial=-1) + 2, -1)
        place_P[position_T] = np.arange(len(position_T))
        return place_P, indices_TK, weights_TK


def _wider(slots_TK: np.ndarray, K: int, fill: int) -> np.ndarray:
    return np.pad(slots_TK, ((0, 0), (0, K - slots_TK.shape[1])), constant_values=fill)


def _where(given_T: torch.Tensor, made: Routing, live: Routing) -> Routing:
    """``made`` for the tokens given, ``live`` for the others; the narrower one gets empty slots."""
    K = max(made.indices_TK.shape[1], live.indices_TK.shape[1])
    sides = []
    for routing in (made, live):
        missing = (0, K - routing.indices_TK.shape[1])
        indices_TK = functional.pad(routing.indices_TK, missing, value=live.num_experts)
        sides.append((functional.pad(routing.weights_TK, missing), indices_TK.long()))
    (weights, indices), (live_weights, live_indices) = sides
    given_T1 = given_T[:, None]
    weights_TK = torch.where(given_T1, weights, live_weights.to(weights.dtype))
    return Routing(live.logits_TE, weights_TK, torch.where(given_T1, indices, live_indices))
