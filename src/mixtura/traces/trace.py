"""``Trace``: every decision of every router as columns of equal length; in a file it is one safetensors file.

One row is one slot of one token in one layer: T tokens, L layers and K slots make T L K rows, the K slots of a token in
a layer one after the other. E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixtura.core.errors import FileFormatError, OptionError, ShapeError, unknown_name
from mixtura.core.files import write_file
from mixtura.core.routing import Routing

KIND = "mixtura-trace"
VERSION = 1
PREFILL, DECODE, REJECTED = 0, 1, 2
LOGITS = "logits."  # before the name of a layer, in a file
COLUMNS = {
    "call": np.int32,
    "row": np.int32,
    "sequence": np.int32,
    "position": np.int32,
    "token": np.int32,
    "valid": np.bool_,
    "phase": np.int8,
    "domain": np.int16,
    "layer": np.int16,
    "slot": np.int16,
    "expert": np.int32,
    "weight": np.float32,
}


@dataclasses.dataclass(eq=False)
class Trace:
    """Decisions of routers.

    Attributes:
        call: number of the model's forward call, from 0.
        row: row of the batch in that call.
        sequence: number of the sequence that the row continues, from 0; a call without a past begins new ones, and a
            beam that takes the past of another beam is a sequence whose parent is the other (``parents``).
        position: place of the token in its sequence, padding not counted; -1 for padding.
        token: id, -1 if unknown.
        valid: False for padding.
        phase: 0 prefill or training, 1 decode, 2 a draft that was rejected.
        domain: index into ``domains``, -1 if none was given.
        layer: index into ``layers``.
        slot: 0 .. K - 1.
        expert: 0 .. E - 1, or E for an empty slot.
        weight: gate of the slot.
        meta: ``layers`` (names), ``experts`` (E of each layer), ``domains`` (names), ``model``, ``parents``; plain
            JSON.
        logits: of each layer (tokens, E), in the order of its tokens; empty unless they were asked for.

    Raises:
        ShapeError: if columns have unequal lengths, an index points outside of ``meta``, or logits do not fit.
    """

    call: np.ndarray
    row: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    token: np.ndarray
    valid: np.ndarray
    phase: np.ndarray
    domain: np.ndarray
    layer: np.ndarray
    slot: np.ndarray
    expert: np.ndarray
    weight: np.ndarray
    meta: dict[str, Any]
    logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: column.shape for name, column in self.columns.items()}
        if len(set(shapes.values())) != 1 or self.call.ndim != 1:
            raise ShapeError(f"columns must have one dimension and equal lengths, got {shapes}")
        if not len(self):
            return
        for name, known in (("layer", self.layers), ("domain", self.domains)):
            column = getattr(self, name)
            if column.max() >= len(known) or column.min() < (0 if name == "layer" else -1):
                raise ShapeError(f"column {name} must index the {len(known)} of meta, got up to {column.max()}")
        if (self.expert > np.asarray(self.meta["experts"])[self.layer]).any() or self.expert.min() < 0:
            raise ShapeError("column expert must lie in 0 .. E of its layer")
        for name, logits_TE in self.logits.items():
            tokens = int(((self.slot == 0) & (self.layer == _index("layer", name, self.layers))).sum())
            if logits_TE.shape != (tokens, self.num_experts(name)):
                raise ShapeError(f"logits of layer {name} must have shape {(tokens, self.num_experts(name))}")

    @classmethod
    def empty(cls, **meta: Any) -> Trace:
        """A trace without rows."""
        defaults = {"layers": [], "experts": [], "domains": [], "model": "", "parents": {}}
        return cls(**{name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}, meta={**defaults, **meta})

    def __len__(self) -> int:
        return len(self.call)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All columns by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self.meta["layers"])

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.meta["domains"])

    @property
    def parents(self) -> dict[int, tuple[int, int]]:
        """Of a sequence that began as another one: that one, and the position from which it is its own."""
        return {int(s): (int(parent), int(at)) for s, (parent, at) in self.meta.get("parents", {}).items()}

    def num_experts(self, layer: str) -> int:
        """E of a layer; raises ``UnknownNameError`` for a layer that is not there."""
        return int(self.meta["experts"][_index("layer", layer, self.layers)])

    def select(self, rows: np.ndarray) -> Trace:
        """The rows of a mask or of indices; meta stays, and the logits of the tokens whose first slot is among them."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Trace(**columns, meta=self.meta, logits={n: self._logits_at(rows, n) for n in self.logits})

    def _logits_at(self, rows: np.ndarray, layer: str) -> np.ndarray:
        first = (self.layer == self.layers.index(layer)) & (self.slot == 0)
        token = np.where(first, np.cumsum(first) - 1, -1)[rows]
        logits_TE: np.ndarray = self.logits[layer][token[token >= 0]]
        return logits_TE

    def of_layer(self, layer: str) -> Trace:
        """The rows of one layer.

        Raises:
            UnknownNameError: with the nearest name.
        """
        return self.select(self.layer == _index("layer", layer, self.layers))

    def of_domain(self, domain: str) -> Trace:
        """The rows of one domain.

        Raises:
            UnknownNameError: with the nearest name.
        """
        return self.select(self.domain == _index("domain", domain, self.domains))

    def counted(self) -> Trace:
        """The rows that statistics count: neither padding nor rejected drafts; empty slots stay."""
        return self.select(self.valid & (self.phase != REJECTED))

    def path(self, sequence: int) -> Trace:
        """The rows of a sequence, and those of its parents that lie before it; padding and rejected drafts left out.

        Raises:
            OptionError: if no row is of that sequence.
        """
        if sequence not in self.sequence:
            known = np.unique(self.sequence).tolist()
            raise OptionError(f"sequence must be one of {', '.join(map(str, known[:8]))} ..., got {sequence}")
        mask, end, parents = np.zeros(len(self), bool), np.iinfo(np.int64).max, self.parents
        while True:
            mask |= (self.sequence == sequence) & (self.position < end)
            if sequence not in parents:
                return self.select(mask & self.valid & (self.phase != REJECTED))
            sequence, at = parents[sequence]
            end = min(end, at)

    def final(self) -> Trace:
        """Of each sequence, position and layer the record of the last call; padding and rejected drafts left out."""
        rows = self.counted()
        keys = np.stack([rows.sequence, rows.position, rows.layer])
        places = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        last = np.full(places.max(initial=-1) + 1, -1)
        np.maximum.at(last, places, rows.call)
        return rows.select(rows.call == last[places])

    def routing(self, layer: str) -> Routing:
        """Decisions of one layer as a ``Routing`` of its tokens, in the order of the rows; NaN for unknown logits."""
        rows = self.of_layer(layer)
        E, token_S = self.num_experts(layer), np.cumsum(rows.slot == 0) - 1
        T, K = int((rows.slot == 0).sum()), int(rows.slot.max(initial=-1)) + 1
        indices_TK, weights_TK = np.full((T, K), E, np.int64), np.zeros((T, K), np.float32)
        indices_TK[token_S, rows.slot] = rows.expert
        weights_TK[token_S, rows.slot] = rows.weight
        unknown_TE = np.broadcast_to(np.float32("nan"), (T, E))
        return Routing(self.logits.get(layer, unknown_TE)[:T], weights_TK, indices_TK)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        metadata = {"kind": KIND, "version": str(VERSION), "meta": json.dumps(self.meta)}
        arrays = {**self.columns, **{f"{LOGITS}{name}": logits_TE for name, logits_TE in self.logits.items()}}
        with write_file(Path(path)) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: if the file is not there, truncated, of another kind or of a newer version.
        """
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                _check_kind(path, metadata)
                columns = {name: file.get_tensor(name) for name in COLUMNS}
                logits = {n.removeprefix(LOGITS): file.get_tensor(n) for n in file.keys() if n.startswith(LOGITS)}  # noqa: SIM118
            return cls(**columns, meta=json.loads(metadata["meta"]), logits=logits)
        except (SafetensorError, OSError, KeyError, TypeError, ShapeError, json.JSONDecodeError) as error:
            raise FileFormatError(f"{str(path)!r} is not a whole trace: {error}") from error

    @classmethod
    def concat(cls, traces: Iterable[Trace]) -> Trace:
        """Several traces of one model in a row; calls and sequences are numbered on, domains are joined by name.

        Raises:
            OptionError: if there is none, their layers or numbers of experts differ, or some have logits and some not.
        """
        parts = list(traces)
        if not parts:
            raise OptionError("traces must hold at least one trace, got none")
        structures = {(tuple(t.meta["layers"]), tuple(t.meta["experts"])) for t in parts}
        if len(structures) != 1:
            raise OptionError(f"traces must have the same layers and experts, got {sorted(structures)}")
        if len({tuple(sorted(t.logits)) for t in parts}) != 1:
            raise OptionError("traces must have logits of the same layers, or none")
        domains = list(dict.fromkeys(name for t in parts for name in t.domains))
        columns, parents = _numbered_on([_renamed(t, domains) for t in parts], [t.parents for t in parts])
        logits = {name: np.concatenate([t.logits[name] for t in parts]) for name in parts[0].logits}
        return cls(**columns, meta={**parts[0].meta, "domains": domains, "parents": parents}, logits=logits)


def _renamed(trace: Trace, domains: list[str]) -> dict[str, np.ndarray]:
    """Columns with the domain as an index into ``domains``."""
    index = np.asarray([domains.index(name) for name in trace.domains] + [-1], np.int16)
    return {**trace.columns, "domain": index[trace.domain]}


def _numbered_on(
    parts: list[dict[str, np.ndarray]], parents: list[dict[int, tuple[int, int]]]
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Columns one after the other, calls and sequences counted on, and the parents of the sequences."""
    joined: dict[str, list[int]] = {}
    call = sequence = 0
    for part, known in zip(parts, parents, strict=True):
        part["call"] = part["call"] + np.int32(call)
        part["sequence"] = part["sequence"] + np.int32(sequence)
        joined |= {str(s + sequence): [parent + sequence, at] for s, (parent, at) in known.items()}
        call = int(part["call"].max(initial=call - 1)) + 1
        sequence = int(part["sequence"].max(initial=sequence - 1)) + 1
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}, joined


def _index(kind: str, name: str, known: list[str]) -> int:
    if name not in known:
        raise unknown_name(kind, name, known)
    return known.index(name)


def _check_kind(path: str | Path, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise FileFormatError(f"{str(path)!r} is no trace: kind {metadata.get('kind')!r}, expected {KIND!r}")
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise FileFormatError(f"{str(path)!r} has version {version!r}, known are up to {VERSION}; upgrade mixtura")
