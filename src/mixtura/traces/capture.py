"""``capture``: every decision that a model takes inside of a ``with``, in training and in generation.

Decisions are read from the tape of each forward call, of our mixtures and native ones alike: under PEFT, DDP,
activation checkpointing (what is run again is not recorded again) and torch.compile, whether compiled before or after.

B rows of a call, Q positions of it, T = B Q tokens row by row, K slots a token, E experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError
from mixtura.core.routing import Routing
from mixtura.hf.caches import watch_caches
from mixtura.hf.forward import Listener, listen
from mixtura.hf.selection import config_of, layer_selections
from mixtura.nn.state import RouterState
from mixtura.traces.sequences import Sequences, Tokens
from mixtura.traces.trace import COLUMNS, Trace

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@contextlib.contextmanager
def capture(model: nn.Module, domain: str | Sequence[str] | None = None, *, logits: bool = False) -> Iterator[Trace]:
    """Trace of the decisions of ``model``; it is empty inside of the ``with`` and filled when the block ends.

    Rows that generation has ended early stay in the batch and are routed on; they count as padding. Beams continue the
    sequence of the beam whose cache they took, drafts of assisted decoding that were rejected have a phase of their
    own. Without a cache each call begins new sequences. The last chunk of a prompt looks like decoding if it is one
    token.

    Args:
        model: with mixtures or routers of ours, or any of transformers with decorated experts.
        domain: where the text comes from: one name, or one for each row of a batch (beams of a row share it).
        logits: whether to keep the routers' logits too.

    Raises:
        NotExpressibleError: if the model has no mixture that could be seen.
        OptionError: if ``domain`` does not fit the number of rows, or the model checkpoints activations reentrantly.

    Example:
        >>> with capture(model, domain="man-de") as trace:
        ...     model.generate(**batch)
        >>> trace.save("trace.safetensors")
    """
    selections = layer_selections(model)
    if not selections:
        raise NotExpressibleError(_why_unseen(model))
    trace = Trace.empty(
        layers=list(selections),
        experts=[selection.num_experts for selection in selections.values()],
        domains=_domain_names(domain),
        model=_name(model),
    )
    recorder = _Recorder(trace, domain, Sequences.of(model), logits)
    try:
        with listen(model, recorder), watch_caches(recorder.sequences):
            yield trace
    finally:
        recorder.fill()
    if not len(trace):
        what = "no forward call was made" if not recorder.calls else "the calls reached none of its mixtures"
        warnings.warn(f"capture saw no decision: {what}", MixturaWarning, stacklevel=3)


class _Decision(NamedTuple):
    """What one layer decided in one call; logits are empty unless asked for."""

    layer: int
    indices_TK: np.ndarray
    weights_TK: np.ndarray
    logits_TE: np.ndarray


@dataclasses.dataclass
class _Call:
    """One forward call."""

    number: int
    tokens: Tokens
    domain_B: np.ndarray
    decisions: list[_Decision] = dataclasses.field(default_factory=list)

    def columns(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of each layer, (T K,) each."""
        B, Q = self.tokens.token_BQ.shape
        by_row = {"row": np.arange(B), "sequence": self.tokens.sequence_B, "domain": self.domain_B}
        by_token = {
            "call": np.full(B * Q, self.number),
            "token": self.tokens.token_BQ.reshape(-1),
            "valid": self.tokens.valid_BQ.reshape(-1),
            "position": self.tokens.position_BQ.reshape(-1),
            "phase": self.tokens.phase_BQ.reshape(-1),
            **{name: np.repeat(column, Q) for name, column in by_row.items()},
        }
        for layer, indices_TK, weights_TK, _ in self.decisions:
            T, K = indices_TK.shape
            columns = {name: np.repeat(column, K) for name, column in by_token.items()}
            slots = {"layer": np.full(T * K, layer), "slot": np.tile(np.arange(K), T)}
            yield {**columns, **slots, "expert": indices_TK.reshape(-1), "weight": weights_TK.reshape(-1)}


class _Recorder(Listener):
    """What one capture has seen."""

    def __init__(self, trace: Trace, domain: str | Sequence[str] | None, sequences: Sequences, logits: bool) -> None:
        self.trace, self.domain, self.sequences, self.logits = trace, domain, sequences, logits
        self.number = {name: i for i, name in enumerate(trace.layers)}
        self.calls: list[_Call] = []
        self._open: dict[int, _Call] = {}

    def opened(self, state: RouterState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward call of the decoder begins; one that ``torch.export`` makes has no values, and is left out."""
        if torch.compiler.is_exporting():
            return
        tokens = self.sequences.open(args, kwargs)
        call = _Call(len(self.calls), tokens, self._domain_of_rows(len(tokens.token_BQ)))
        self.calls.append(call)
        self._open[id(state)] = call

    def closed(self, state: RouterState) -> None:
        """It has ended: read its tape."""
        call = self._open.pop(id(state), None)
        if call is None:
            return
        decisions = [self._decision(record.layer, record.routing) for record in state.tape.records]
        call.decisions = sorted(decisions, key=lambda decision: decision.layer)

    def fill(self) -> None:
        """Give the trace its columns."""
        parts = [columns for call in self.calls for columns in call.columns()]
        for name, dtype in COLUMNS.items():
            column = np.concatenate([part[name] for part in parts]) if parts else np.zeros(0)
            setattr(self.trace, name, column.astype(dtype))
        if self.logits:
            self.trace.logits = {name: self._logits_of(i) for i, name in enumerate(self.trace.layers)}
        used = set(np.unique(self.trace.sequence).tolist())
        parents = {str(s): list(parent) for s, parent in self.sequences.parents.items() if s in used}
        self.trace.meta["parents"] = parents

    def _decision(self, layer: str, routing: Routing) -> _Decision:
        indices_TK, weights_TK = _numpy(routing.indices_TK), _numpy(routing.weights_TK.float())
        logits_TE = _numpy(routing.logits_TE.float()) if self.logits else np.zeros((0, routing.num_experts))
        return _Decision(self.number[layer], indices_TK, weights_TK, logits_TE)

    def _logits_of(self, layer: int) -> np.ndarray:
        E = self.trace.meta["experts"][layer]
        parts = [d.logits_TE for call in self.calls for d in call.decisions if d.layer == layer]
        return np.concatenate([np.zeros((0, E), np.float32), *parts]).astype(np.float32)

    def _domain_of_rows(self, rows: int) -> np.ndarray:
        if self.domain is None or isinstance(self.domain, str):
            return np.full(rows, -1 if self.domain is None else 0)
        if not self.domain or rows % len(self.domain):
            raise OptionError(f"domain must be one name, or one for each of the {rows} rows, got {len(self.domain)}")
        index = [self.trace.domains.index(name) for name in self.domain]
        return np.repeat(np.asarray(index), rows // len(index))


def _why_unseen(model: nn.Module) -> str:
    config = config_of(model).get_text_config()
    if not any((getattr(config, name, 0) or 0) > 1 for name in EXPERT_COUNTS):
        return f"{type(model).__name__} has no mixture that capture could see"
    return (
        f"{type(model).__name__} has no mixture that capture could see: {config.model_type} computes its experts in a "
        "way of its own, not in modules that transformers decorates"
    )


def _domain_names(domain: str | Sequence[str] | None) -> list[str]:
    names = [] if domain is None else [domain] if isinstance(domain, str) else domain
    return list(dict.fromkeys(names))


def _name(model: nn.Module) -> str:
    return str(getattr(config_of(model), "_name_or_path", "") or type(model).__name__)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
