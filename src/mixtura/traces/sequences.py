"""Which sequence each row of a forward call continues, and at which position: through caches, beams and drafts.

Sequences are numbered from 0 in the order in which they begin. A row whose cache was that of another row continues that
row's sequence; if several rows do so, all but the first begin a sequence of their own, whose parent is the other.

B rows of a call, Q positions of it, L positions before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mixtura.hf.caches import CacheWatcher
from mixtura.hf.forward import padding_mask, past_length
from mixtura.traces.trace import DECODE, PREFILL, REJECTED


@dataclasses.dataclass
class Tokens:
    """The tokens of one forward call.

    Attributes:
        sequence_B: number of the sequence of each row.
        token_BQ: ids, -1 if unknown.
        valid_BQ: False for padding.
        position_BQ: place in the sequence, -1 for padding.
        phase_BQ: changes when drafts are rejected.
    """

    sequence_B: np.ndarray
    token_BQ: np.ndarray
    valid_BQ: np.ndarray
    position_BQ: np.ndarray
    phase_BQ: np.ndarray


@dataclasses.dataclass
class _Rows:
    """What is in a cache.

    Attributes:
        sequence_B: number of the sequence of each row.
        valid_BL: which of the positions are real.
        ended_B: whether the row's generation has ended.
        former_B: row of ``sequence_B`` that each row of the cache was, if rows were moved since the last call.
        last: tokens of the last call.
        branches: whether positions of earlier calls were removed, so that what follows is another sequence.
    """

    sequence_B: np.ndarray
    valid_BL: np.ndarray
    ended_B: np.ndarray
    former_B: np.ndarray
    last: Tokens | None = None
    branches: bool = False


class Sequences(CacheWatcher):
    """Follows the rows of a model from call to call.

    Args:
        eos: tokens that end a generation.
        pad: token that fills up behind them.

    Attributes:
        parents: of a sequence that began as another one: that one, and the position from which it is its own.
    """

    def __init__(self, eos: set[int], pad: int) -> None:
        self.eos, self.pad = eos, pad
        self.parents: dict[int, tuple[int, int]] = {}
        self.count = 0
        self._of_cache: weakref.WeakKeyDictionary[Any, _Rows] = weakref.WeakKeyDictionary()
        self._without_cache: _Rows | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Sequences:
        """With the tokens that end a generation of that model."""
        config = getattr(model, "generation_config", None)
        eos, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return cls(set(ends), next(iter(ends), -1) if pad is None else int(pad))

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
        """The tokens of a call of the decoder with these arguments."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        B, Q = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        token_BQ = np.full((B, Q), -1) if ids is None else _numpy(ids)
        mask_T = padding_mask(args, kwargs)
        valid_BQ = np.ones((B, Q), bool) if mask_T is None else _numpy(mask_T).reshape(B, Q)
        past = past_length(kwargs)
        rows = self._rows(kwargs.get("past_key_values"), B, past, kwargs.get("attention_mask"))
        decode = past > 0 and Q == 1
        if decode:
            valid_BQ = self._without_ended(rows, token_BQ, valid_BQ)
        else:
            rows.ended_B = np.zeros(B, bool)
        seen_B1 = rows.valid_BL.sum(1, keepdims=True)
        position_BQ = np.where(valid_BQ, seen_B1 + valid_BQ.cumsum(1) - 1, -1)
        phase_BQ = np.full((B, Q), DECODE if decode else PREFILL)
        rows.valid_BL = np.concatenate([rows.valid_BL, valid_BQ], 1)
        rows.last = Tokens(rows.sequence_B, token_BQ, valid_BQ, position_BQ, phase_BQ)
        return rows.last

    def moved(self, cache: Any, index_of: Callable[[int], torch.Tensor]) -> None:
        """Rows of a cache were reordered, repeated or dropped."""
        rows = self._of_cache.get(cache)
        if rows is not None:
            rows.former_B = rows.former_B[_numpy(index_of(len(rows.former_B)))]

    def cropped(self, cache: Any) -> None:
        """Positions were removed: drafts, if they are of the last call and some of it are left."""
        rows = self._of_cache.get(cache)
        if rows is not None:
            with contextlib.suppress(ValueError):  # linear attention alone counts no positions; the next call tells
                self._crop(rows, int(cache.get_seq_length()))

    def _rows(self, cache: Any, B: int, past: int, mask: Any) -> _Rows:
        """What is known of the cache of a call, as it is now."""
        rows = self._known(cache, B, past)
        if rows is None:
            rows = self._begin(B, past, mask)
        if past < rows.valid_BL.shape[1]:
            self._crop(rows, past)
        elif past > rows.valid_BL.shape[1]:  # calls that were not seen
            unseen_BL = np.ones((len(rows.valid_BL), past - rows.valid_BL.shape[1]), bool)
            rows.valid_BL = np.concatenate([rows.valid_BL, unseen_BL], 1)
        self._move(rows)
        if cache is None:
            self._without_cache = rows
        else:
            self._of_cache[cache] = rows
        return rows

    def _known(self, cache: Any, B: int, past: int) -> _Rows | None:
        if cache is None or past == 0:
            return None
        rows = self._of_cache.get(cache)
        if rows is None and self._without_cache is not None and self._without_cache.valid_BL.shape[1] == past:
            rows, self._without_cache = self._without_cache, None  # the model made the cache itself
        return rows if rows is not None and len(rows.former_B) == B else None

    def _begin(self, B: int, past: int, mask: Any) -> _Rows:
        sequence_B = self._new(B)
        valid_BL = np.ones((B, past), bool)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > past > 0:
            valid_BL = np.broadcast_to(_numpy(mask[:, :past].bool()), (B, past))
        return _Rows(sequence_B, valid_BL, np.zeros(B, bool), np.arange(B))

    def _new(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _move(self, rows: _Rows) -> None:
        """Carry out what was done to the rows since the last call; a parent with several children forks."""
        taken: set[int] = set()
        sequences = []
        for former in rows.former_B.tolist():
            parent = int(rows.sequence_B[former])
            if former in taken or rows.branches:
                (own,) = self._new(1).tolist()
                self.parents[own] = (parent, int(rows.valid_BL[former].sum()))
                parent = own
            taken.add(former)
            sequences.append(parent)
        rows.sequence_B = np.asarray(sequences, np.int64)
        rows.valid_BL, rows.ended_B = rows.valid_BL[rows.former_B], rows.ended_B[rows.former_B]
        rows.former_B, rows.branches = np.arange(len(sequences)), False

    def _crop(self, rows: _Rows, length: int) -> None:
        removed = rows.valid_BL.shape[1] - length
        rows.valid_BL = rows.valid_BL[:, :length]
        if rows.last is None:
            return
        Q = rows.last.phase_BQ.shape[1]
        if removed >= Q:
            rows.branches, rows.last = True, None
        else:
            if length + removed > Q > 1:  # a call of drafts: it has a past, and a crop follows
                rows.last.phase_BQ[:] = DECODE
            rows.last.phase_BQ[:, Q - removed :] = REJECTED

    def _without_ended(self, rows: _Rows, token_B1: np.ndarray, valid_B1: np.ndarray) -> np.ndarray:
        """Filler tokens behind the end of a sequence are no tokens, though generation masks them as real."""
        filler_B1 = rows.ended_B[:, None] & (token_B1 == self.pad)
        rows.ended_B = rows.ended_B | np.isin(token_B1[:, 0], list(self.eos))
        return valid_B1 & ~filler_B1


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
