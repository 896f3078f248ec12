"""``Trace``: every decision of every router as columns of equal length; in a file it is one safetensors file.

One row is one slot of one token in one layer: T tokens, L layers and K slots make T L K rows, the K slots of a token in
a layer one after the other.
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
        sequence: number of the sequence that the row continues, from 0; a call without a past begins new ones.
        position: place of the token in its sequence, padding not counted; -1 for padding.
        token: id, -1 if unknown.
        valid: False for padding.
        phase: 0 prefill or training, 1 decode, 2 a draft that was rejected.
        domain: index into ``domains``, -1 if none was given.
        layer: index into ``layers``.
        slot: 0 .. K - 1.
        expert: 0 .. E - 1, or E for an empty slot.
        weight: gate of the slot.
        meta: ``layers`` (names), ``experts`` (E of each layer), ``domains`` (names), ``model``; plain JSON.

    Raises:
        ShapeError: if columns have unequal lengths, or an index points outside of ``meta``.
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

    @classmethod
    def empty(cls, **meta: Any) -> Trace:
        """A trace without rows."""
        defaults = {"layers": [], "experts": [], "domains": [], "model": ""}
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

    def num_experts(self, layer: str) -> int:
        """E of a layer; raises ``UnknownNameError`` for a layer that is not there."""
        return int(self.meta["experts"][_index("layer", layer, self.layers)])

    def select(self, rows: np.ndarray) -> Trace:
        """The rows of a mask or of indices; meta stays."""
        return Trace(**{name: column[rows] for name, column in self.columns.items()}, meta=self.meta)

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

    def routing(self, layer: str) -> Routing:
        """Decisions of one layer as a ``Routing`` of its tokens, in the order of the rows; its logits are NaN."""
        rows = self.of_layer(layer)
        E, token_S = self.num_experts(layer), np.cumsum(rows.slot == 0) - 1
        T, K = int((rows.slot == 0).sum()), int(rows.slot.max(initial=-1)) + 1
        indices_TK, weights_TK = np.full((T, K), E, np.int64), np.zeros((T, K), np.float32)
        indices_TK[token_S, rows.slot] = rows.expert
        weights_TK[token_S, rows.slot] = rows.weight
        return Routing(np.broadcast_to(np.float32("nan"), (T, E)), weights_TK, indices_TK)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        metadata = {"kind": KIND, "version": str(VERSION), "meta": json.dumps(self.meta)}
        with write_file(Path(path)) as partial:
            save_file({name: np.ascontiguousarray(c) for name, c in self.columns.items()}, partial, metadata)
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
            return cls(**columns, meta=json.loads(metadata["meta"]))
        except (SafetensorError, OSError, KeyError, TypeError, ShapeError, json.JSONDecodeError) as error:
            raise FileFormatError(f"{str(path)!r} is not a whole trace: {error}") from error

    @classmethod
    def concat(cls, traces: Iterable[Trace]) -> Trace:
        """Several traces of one model in a row; calls and sequences are numbered on, domains are joined by name.

        Raises:
            OptionError: if there is none, or their layers or numbers of experts differ.
        """
        parts = list(traces)
        if not parts:
            raise OptionError("traces must hold at least one trace, got none")
        structures = {(tuple(t.meta["layers"]), tuple(t.meta["experts"])) for t in parts}
        if len(structures) != 1:
            raise OptionError(f"traces must have the same layers and experts, got {sorted(structures)}")
        domains = list(dict.fromkeys(name for t in parts for name in t.domains))
        columns = _numbered_on([_renamed(t, domains) for t in parts])
        return cls(**columns, meta={**parts[0].meta, "domains": domains})


def _renamed(trace: Trace, domains: list[str]) -> dict[str, np.ndarray]:
    """Columns with the domain as an index into ``domains``."""
    index = np.asarray([domains.index(name) for name in trace.domains] + [-1], np.int16)
    return {**trace.columns, "domain": index[trace.domain]}


def _numbered_on(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns one after the other, calls and sequences counted on."""
    for counter in ("call", "sequence"):
        first = 0
        for part in parts:
            part[counter] = part[counter] + np.int32(first)
            first = int(part[counter].max(initial=first - 1)) + 1
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


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
