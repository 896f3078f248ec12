"""``capture``: every decision that a model takes inside of a ``with``, in training and in generation.

Layers of the family mixtura are read from their tape. Native mixtures of transformers are seen at the experts seam, by
hooks on the modules that transformers decorates. What activation checkpointing runs again is not recorded again.

B rows of a call, Q positions of it, T = B Q tokens row by row, K slots a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError, ShapeError
from mixtura.hf.forward import padding_mask, past_length, record
from mixtura.hf.modeling import mixtures
from mixtura.hf.sites import decoder, decoder_layers
from mixtura.nn.state import RouterState
from mixtura.traces.trace import COLUMNS, DECODE, PREFILL, Trace


@contextlib.contextmanager
def capture(model: nn.Module, domain: str | Sequence[str] | None = None) -> Iterator[Trace]:
    """Trace of the decisions of ``model``; it is empty inside of the ``with`` and filled when the block ends.

    Rows that generation has ended early stay in the batch and are routed on; they count as padding. Beams and drafts of
    assisted decoding are recorded as the rows and calls that the model sees: which beam survives and which draft is
    rejected is not traced back.

    Args:
        model: of the family mixtura, or any model of transformers with decorated experts; also under PEFT.
        domain: where the text comes from: one name, or one for each row of a batch (beams of a row share it).

    Raises:
        NotExpressibleError: if the model has no mixture that could be seen.
        OptionError: if ``domain`` does not fit the number of rows.

    Example:
        >>> with capture(model, domain="man-de") as trace:
        ...     model.generate(**batch)
        >>> trace.save("trace.safetensors")
    """
    own, native = mixtures(model), native_experts(model)
    if not own and not native:
        raise NotExpressibleError(f"{type(model).__name__} has no mixture that capture could see")
    sizes = {name: m.router.num_experts for name, m in own.items()} | {n: len(m.down_proj) for n, m in native.items()}
    names = sorted(sizes, key=lambda name: (int(name.split(".")[0]), name))
    trace = Trace.empty(
        layers=names, experts=[int(sizes[n]) for n in names], domains=_domain_names(domain), model=_name(model)
    )
    with contextlib.ExitStack() as stack:
        states = stack.enter_context(record(model)) if own else []
        recorder = _Recorder(trace, domain, states, _ends(model))
        for handle in recorder.attach(decoder(model), native):
            stack.callback(handle.remove)
        try:
            yield trace
        finally:
            recorder.fill()
    if not len(trace):
        warnings.warn(
            "capture saw no decision: no forward call was made, or the model was compiled before (hooks that are added "
            "after torch.compile never run)",
            MixturaWarning,
            stacklevel=3,
        )


def native_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Experts that transformers decorates, by the number of their decoder layer; a second one has its path behind."""
    ours = {id(part) for mixture in mixtures(model).values() for part in mixture.modules()}
    found: dict[str, nn.Module] = {}
    for number, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            if id(module) not in ours and _is_experts(module):
                found[str(number) if str(number) not in found else f"{number}.{path}"] = module
    return found


def _is_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return "has_gate" in vars(module) and down is not None and down.ndim == 3


@dataclasses.dataclass
class _Call:
    """One forward call: columns of its tokens, (T,) each, and what each layer decided."""

    tokens: dict[str, np.ndarray]
    decisions: list[tuple[int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def rows(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of each layer, (T K,) each."""
        for layer, indices_TK, weights_TK in sorted(self.decisions, key=lambda decision: decision[0]):
            T, K = indices_TK.shape
            columns = {name: np.repeat(column, K) for name, column in self.tokens.items()}
            slots = {"layer": np.full(T * K, layer), "slot": np.tile(np.arange(K), T)}
            yield {**columns, **slots, "expert": indices_TK.reshape(-1), "weight": weights_TK.reshape(-1)}


class _Recorder:
    """Hooks of one capture, and what it remembers of the sequences between calls."""

    def __init__(
        self, trace: Trace, domain: str | Sequence[str] | None, states: list[RouterState], ends: tuple[set[int], int]
    ) -> None:
        self.trace, self.domain, self.states = trace, domain, states
        self.eos, self.pad = ends
        self.number = {name: i for i, name in enumerate(trace.layers)}
        self.calls: list[_Call] = []
        self.open_call: _Call | None = None
        self.sequences = 0
        self.sequence_B = self.padded_B = np.zeros(0, np.int64)
        self.ended_B = np.zeros(0, bool)

    def attach(self, inner: nn.Module, native: Mapping[str, nn.Module]) -> Iterator[Any]:
        """Add all hooks; gives their handles."""
        yield inner.register_forward_pre_hook(self.open, with_kwargs=True)
        yield inner.register_forward_hook(self.close, always_call=True)
        for name, module in native.items():
            hook = lambda _, args, kwargs, name=name: self.decide(name, *_choice(args, kwargs))
            yield module.register_forward_pre_hook(hook, with_kwargs=True)

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward call of the decoder begins."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        B, Q = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        token_BQ = np.full((B, Q), -1) if ids is None else _numpy(ids)
        mask_T = padding_mask(args, kwargs)
        valid_BQ = np.ones((B, Q), bool) if mask_T is None else _numpy(mask_T).reshape(B, Q)
        past = past_length(kwargs)
        if past == 0 or len(self.sequence_B) != B:
            self._begin(B)
        seen_B = self._seen(past, Q, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        self.padded_B = self.padded_B + (~valid_BQ).sum(1)
        decode = past > 0 and Q == 1
        if decode:
            valid_BQ = self._without_ended(token_BQ, valid_BQ)
        position_BQ = np.where(valid_BQ, seen_B[:, None] + valid_BQ.cumsum(1) - 1, -1)
        self.open_call = _Call(self._token_columns(token_BQ, valid_BQ, position_BQ, DECODE if decode else PREFILL))
        self.calls.append(self.open_call)

    def decide(self, layer: str, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """A layer has decided; outside of a forward call it is a recomputation, and ignored."""
        if self.open_call is None:
            return
        T, K = len(self.open_call.tokens["token"]), indices_TK.shape[-1]
        if indices_TK.numel() != T * K or weights_TK.shape != indices_TK.shape:
            raise ShapeError(f"layer {layer}: {T} tokens, but decisions of shape {tuple(indices_TK.shape)}")
        indices, weights = _numpy(indices_TK).reshape(T, K), _numpy(weights_TK.float()).reshape(T, K)
        self.open_call.decisions.append((self.number[layer], indices, weights))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward call has ended: read its tape, and let the tape go."""
        for state in self.states:
            for name, routing in state.tape.records:
                self.decide(name, routing.indices_TK, routing.weights_TK)
        self.states.clear()
        self.open_call = None

    def fill(self) -> None:
        """Give the trace its columns."""
        parts = [rows for call in self.calls for rows in call.rows()]
        for name, dtype in COLUMNS.items():
            column = np.concatenate([part[name] for part in parts]) if parts else np.zeros(0)
            setattr(self.trace, name, column.astype(dtype))

    def _begin(self, rows: int) -> None:
        self.sequence_B = self.sequences + np.arange(rows)
        self.sequences += rows
        self.padded_B, self.ended_B = np.zeros(rows, np.int64), np.zeros(rows, bool)

    def _seen(self, past: int, Q: int, mask: Any) -> np.ndarray:
        """How many real tokens of each row came before this call."""
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > Q:
            return np.broadcast_to(_numpy(mask[:, :-Q].bool().sum(1)), self.padded_B.shape)
        return past - self.padded_B

    def _without_ended(self, token_B1: np.ndarray, valid_B1: np.ndarray) -> np.ndarray:
        """Filler tokens behind the end of a sequence are no tokens, though generation masks them as real."""
        filler_B1 = self.ended_B[:, None] & (token_B1 == self.pad)
        self.ended_B = self.ended_B | np.isin(token_B1[:, 0], list(self.eos))
        return valid_B1 & ~filler_B1

    def _token_columns(
        self, token_BQ: np.ndarray, valid_BQ: np.ndarray, position_BQ: np.ndarray, phase: int
    ) -> dict[str, np.ndarray]:
        B, Q = token_BQ.shape
        by_row = {"row": np.arange(B), "sequence": self.sequence_B, "domain": self._domain_of_rows(B)}
        by_token = {"token": token_BQ, "valid": valid_BQ, "position": position_BQ}
        return {
            "call": np.full(B * Q, len(self.calls)),
            "phase": np.full(B * Q, phase),
            **{name: np.repeat(column, Q) for name, column in by_row.items()},
            **{name: column.reshape(-1) for name, column in by_token.items()},
        }

    def _domain_of_rows(self, rows: int) -> np.ndarray:
        if self.domain is None or isinstance(self.domain, str):
            return np.full(rows, -1 if self.domain is None else 0)
        if not self.domain or rows % len(self.domain):
            raise OptionError(f"domain must be one name, or one for each of the {rows} rows, got {len(self.domain)}")
        index = [self.trace.domains.index(name) for name in self.domain]
        return np.repeat(np.asarray(index), rows // len(index))


def _choice(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of a call at the experts seam, (hidden, indices, weights) in all families."""
    _, indices_TK, weights_TK = (*args, *kwargs.values())[:3]
    return indices_TK, weights_TK


def _domain_names(domain: str | Sequence[str] | None) -> list[str]:
    names = [] if domain is None else [domain] if isinstance(domain, str) else domain
    return list(dict.fromkeys(names))


def _ends(model: nn.Module) -> tuple[set[int], int]:
    """Tokens that end a generation, and the one that fills up behind them."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = getattr(config, "pad_token_id", None)
    return set(ends), next(iter(ends), -1) if pad is None else int(pad)


def _name(model: nn.Module) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
