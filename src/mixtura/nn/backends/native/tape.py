"""A decode step as a list of operations over fixed buffers: recorded here in Python, run by one call of the library.

B rows (sequences), D width, E experts, K slots a token, F width of a feed-forward, N columns of a product, R angles of
a rotation. What is summed over the layers, ``x_BD``, is float32; what enters a product has the type of the weights.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mixtura.core.errors import NotExpressibleError
from mixtura.core.selection import SelectionSpec
from mixtura.nn.backends.native.library import ExpertsStruct, library
from mixtura.nn.backends.native.quantized import CodesStruct, QuantizedStruct

MAX_ROWS = 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_PANEL = 16  # rows of codes side by side
_SELECTION = SelectionSpec(k=1)  # the defaults of what no operation does


def _struct(name: str, *fields: tuple[str, Any]) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _same(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


# in the order of mixtura_decode.h
NormStruct = _struct("Norm", *_same(_POINTER, "weight bias"), *_same(_F32, "eps offset"), *_same(_I32, "kind float32"))
LinearStruct = _struct(
    "Linear", *_same(_POINTER, "weight bias quantized"), *_same(_I64, "out inp"), *_same(_I32, "float32 unused")
)
_Embed = _struct("Embed", ("table", _POINTER), ("dim", _I64), ("x", _POINTER), ("scale", _F32), ("unused", _I32))
_Normalize = _struct("Normalize", ("x", _POINTER), ("dim", _I64), ("norm", NormStruct), ("out", _POINTER))
_Linears = _struct(
    "Linears",
    ("x", _POINTER),
    ("norm", NormStruct),
    ("count", _I64),
    ("linear", LinearStruct * 4),
    ("out", _POINTER * 4),
    *_same(_I32, "narrow unused"),
)
AttentionStruct = _struct(
    "Attention",
    *_same(_POINTER, "query key value out"),
    *_same(NormStruct, "query_norm key_norm"),
    *_same(_POINTER, "cosine sine sinks keys values parts"),
    *_same(_I64, "capacity skipped heads groups width rotated window"),
    *_same(_F32, "scale softcap"),
    *_same(_I32, "whole neighbors"),
)
_LinearAdd = _struct("LinearAdd", ("y", _POINTER), ("linear", LinearStruct), ("x", _POINTER))
_FeedForward = _struct(
    "FeedForward",
    ("h", _POINTER),
    ("norm", NormStruct),
    *_same(LinearStruct, "gate up down"),
    *_same(_POINTER, "by_row inner x"),
    *_same(_I32, "activation unused"),
)
_Mixture = _struct(
    "Mixture",
    *_same(_POINTER, "h logits bias"),
    ("experts", ExpertsStruct),
    *_same(_POINTER, "quantized x out workspace"),
    ("slots", _I64),
    *_same(_I32, "sigmoid choose_by_logits renormalize unused"),
    *_same(_F32, "scale unused_too"),
)
_Fold = _struct(
    "Fold",
    ("sum", _POINTER),
    ("dim", _I64),
    ("norm", NormStruct),
    ("x", _POINTER),
    ("factor", _F32),
    ("unused", _I32),
)
_Instruction = _struct("Instruction", ("op", _I64), ("operands", _POINTER))
_Tape = _struct(
    "Tape",
    *_same(_POINTER, "instructions"),
    *_same(_I64, "count"),
    *_same(_I32, "dtype threads"),
    *_same(_I64, "rows length"),
    *_same(_POINTER, "ids positions starts scratch"),
    *_same(_I64, "scratch_bytes"),
)
_KINDS = (_Embed, _Normalize, _Linears, AttentionStruct, _LinearAdd, _FeedForward, _Mixture, _Fold)
_OPERATIONS = {kind: number for number, kind in enumerate(_KINDS)}


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization over the last axis.

    Attributes:
        kind: "rms" or "layer".
        weight: (D,); of RMS, ``offset`` is added to it.
        bias: (D,) or None.
        eps: added to the mean square.
        offset: 1 where a family stores weight - 1.
    """

    kind: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """weight_NK x + bias_N."""

    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None = None

    @property
    def out(self) -> int:
        """N."""
        return len(self.weight_NK)

    def rows(self, begin: int, end: int) -> Linear:
        """The layer that has some of the outputs."""
        return Linear(self.weight_NK[begin:end], None if self.bias_N is None else self.bias_N[begin:end])


@dataclasses.dataclass(frozen=True)
class FewBits:
    """The same with a weight of 8 or 4 bits.

    Attributes:
        struct: its codes as those of the first projection.
        out: N.
        inputs: K.
        tensors: what the struct points into.
        bias_N: of the type of the tape, or None.
    """

    struct: QuantizedStruct
    out: int
    inputs: int
    tensors: tuple[torch.Tensor, ...]
    bias_N: torch.Tensor | None = None

    def rows(self, begin: int, end: int) -> FewBits:
        """The layer that has some of the outputs, from a multiple of 16 on, where a panel of codes begins."""
        if begin % _PANEL:
            raise NotExpressibleError(f"a matrix of few bits is parted at multiples of {_PANEL} rows, not at {begin}")
        panels, struct = -(-self.out // _PANEL), QuantizedStruct.from_buffer_copy(self.struct)
        parts = (t.data_ptr() + t.nbytes // panels * (begin // _PANEL) for t in self.tensors)
        struct.first = CodesStruct(*parts)
        bias_N = None if self.bias_N is None else self.bias_N[begin:end]
        return FewBits(struct, end - begin, self.inputs, self.tensors, bias_N)


class Tape:
    """Records operations, then runs them.

    Args:
        dtype: of weights and caches: float32 or bfloat16.
        rows: B, at most ``MAX_ROWS``.

    Attributes:
        used: weights whose memory the operations read.
        ids_B, positions_B, starts_B: what a step reads: tokens, positions of the rotation, first positions of the cache
            that are not padding.
    """

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        if dtype not in DTYPES or not 1 <= rows <= MAX_ROWS:
            raise NotExpressibleError(f"a tape is float32 or bfloat16 with 1 .. {MAX_ROWS} rows, got {dtype}, {rows}")
        self.dtype, self.rows = dtype, rows
        self.used: list[torch.Tensor] = []
        self.ids_B, self.positions_B, self.starts_B = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
        self._buffers: list[torch.Tensor] = []
        self._operands: list[ctypes.Structure] = []
        self._kept: list[ctypes.Structure] = []
        self._attentions: list[Any] = []
        self._mixtures: list[Any] = []
        self._threads = self._length = 0
        self._tape: Any = None
        self._workspace: list[torch.Tensor] = []

    def embed(self, table_VD: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The tokens' rows, as the ``x_BD`` that later operations add to."""
        x_BD = self._buffer(table_VD.shape[1], wide=True)
        self._add(_Embed(self._weight(table_VD), table_VD.shape[1], x_BD.data_ptr(), scale))
        return x_BD

    def norm(self, x_BD: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """Normalized or as it is, in the type of the weights."""
        h_BD = self._buffer(x_BD.shape[1])
        self._add(_Normalize(x_BD.data_ptr(), x_BD.shape[1], self._norm(norm), h_BD.data_ptr()))
        return h_BD

    def sum(self, width: int) -> torch.Tensor:
        """Zeros in float32 that operations can add to in place of ``x_BD``; ``fold`` makes them zeros again."""
        return self._buffer(width, wide=True)

    def fold(self, sum_BD: torch.Tensor, norm: Norm | None, x_BD: torch.Tensor, factor: float = 1.0) -> None:
        """x += factor times the sum, which is normalized before."""
        pointers = (sum_BD.data_ptr(), sum_BD.shape[1], self._norm(norm), x_BD.data_ptr())
        self._add(_Fold(*pointers, factor))

    def linears(self, x_BD: torch.Tensor, norm: Norm | None, linears: Sequence[Linear | FewBits]) -> list[torch.Tensor]:
        """Up to 4 products of one input, in float32; with a norm the input is that too, else of the weights' type."""
        outs = [self._buffer(linear.out, wide=True) for linear in linears]
        structs = (LinearStruct * 4)(*map(self._linear, linears))
        pointers = (_POINTER * 4)(*(out.data_ptr() for out in outs))
        self._add(_Linears(x_BD.data_ptr(), self._norm(norm), len(linears), structs, pointers))
        return outs

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        width: int,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        norms: tuple[Norm | None, Norm | None] = (None, None),
        whole: bool = False,
        window: int = 0,
        softcap: float = 0.0,
        sinks_H: torch.Tensor | None = None,
        neighbors: bool = False,
    ) -> torch.Tensor:
        """Rotate, write to the cache, attend; (B, H P) in the type of the weights.

        Args:
            query: (B, H P).
            key: (B, V P).
            value: (B, V P).
            width: P of a head, a multiple of 16.
            angles: cosines and sines, (positions, R), or None for no rotation.
            scale: of the scores.
            norms: of queries and keys.
            whole: whether these go over all heads together.
            window: positions that are seen, 0 for all.
            softcap: bound of the scores by tanh, 0 for none.
            sinks_H: scores of no position, of the type of the weights.
            neighbors: whether units are rotated against their neighbors, not halves against halves.
        """
        if width % 16:
            raise NotExpressibleError(f"heads must have a multiple of 16 units, got {width}")
        if angles is not None and 2 * angles[0].shape[1] > width:
            raise NotExpressibleError(f"heads of {width} units cannot be rotated by {angles[0].shape[1]} angles")
        out = self._buffer(query.shape[1])
        pointers = [t.data_ptr() for t in (query, key, value, out)]
        struct = AttentionStruct(*pointers, *map(self._norm, norms))
        if angles is not None:
            struct.cosine, struct.sine, struct.rotated = *map(self._float, angles), angles[0].shape[1]
        if sinks_H is not None:
            struct.sinks = self._weight(sinks_H)
        struct.heads, struct.groups, struct.width = query.shape[1] // width, key.shape[1] // width, width
        struct.window, struct.scale, struct.softcap, struct.whole = window, scale, softcap, whole
        struct.neighbors = neighbors
        self._attentions.append(struct)
        self._add(struct)
        return out

    def linear_add(self, y_BN: torch.Tensor, linear: Linear | FewBits, x_BD: torch.Tensor) -> None:
        """x += linear(y)."""
        self._add(_LinearAdd(y_BN.data_ptr(), self._linear(linear), x_BD.data_ptr()))

    def feed_forward(
        self,
        h_BD: torch.Tensor,
        norm: Norm | None,
        projections: tuple[Linear | FewBits | None, Linear | FewBits, Linear | FewBits],
        activation: int,
        x_BD: torch.Tensor,
        by_row_B1: torch.Tensor | None = None,
    ) -> None:
        """x += down(act(gate h) up h), times the sigmoid of ``by_row_B1`` if it is given.

        Args:
            h_BD: with a norm float32, else in the type of the weights.
            norm: None if h is normalized.
            projections: gate or None, up, down.
            activation: its number in mixtura_native.h.
            x_BD: added to.
            by_row_B1: float32.
        """
        gate, up, down = (LinearStruct() if p is None else self._linear(p) for p in projections)
        inner = self._buffer(projections[1].out)
        by_row = None if by_row_B1 is None else by_row_B1.data_ptr()
        pointers = (by_row, inner.data_ptr(), x_BD.data_ptr())
        self._add(_FeedForward(h_BD.data_ptr(), self._norm(norm), gate, up, down, *pointers, activation))

    def mixture(
        self,
        h_BD: torch.Tensor,
        logits_BE: torch.Tensor,
        spec: SelectionSpec,
        bias_E: torch.Tensor | None,
        experts: ExpertsStruct | QuantizedStruct,
        x_BD: torch.Tensor,
    ) -> None:
        """x += the experts that ``select`` chooses by the logits.

        Raises:
            NotExpressibleError: if the spec asks for more than the operation does.
        """
        check_selection(spec)
        out = self._buffer(x_BD.shape[1])
        bias = None if bias_E is None else self._float(bias_E)
        quantized = isinstance(experts, QuantizedStruct)
        form = (experts.experts, self._keep(experts)) if quantized else (experts, None)
        pointers = (x_BD.data_ptr(), out.data_ptr(), None)
        struct = _Mixture(h_BD.data_ptr(), logits_BE.data_ptr(), bias, *form, *pointers, spec.k)
        struct.sigmoid, struct.choose_by_logits = spec.score == "sigmoid", spec.order == "topk-score"
        struct.renormalize, struct.scale = spec.renormalize is not None, spec.scale
        self._mixtures.append(struct)
        self._add(struct)

    def cache(self, layer: int, keys: torch.Tensor, values: torch.Tensor, skipped: int = 0) -> None:
        """Where the n-th attention finds and leaves keys and values.

        Args:
            layer: n.
            keys: (B, V, capacity, P), contiguous.
            values: the same.
            skipped: position of the sequence that stands at their beginning.
        """
        struct = self._attentions[layer]
        struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        struct.capacity, struct.skipped = keys.shape[2], skipped

    def run(self, length: int) -> None:
        """One step; ``ids_B``, ``positions_B`` and ``starts_B`` are set, and the caches have room.

        Args:
            length: positions in the cache after this step, L.
        """
        threads = torch.get_num_threads()
        if self._tape is None or threads != self._threads or length > self._length:
            self._finish(threads, max(length, 2 * self._length, 1024))
        self._tape.length = length
        _library().mixtura_run_tape(ctypes.byref(self._tape))

    def _finish(self, threads: int, length: int) -> None:
        """Workspaces for that many threads and positions."""
        self._threads, self._length, lib = threads, length, _library()
        pairs = [(_OPERATIONS[type(o)], ctypes.addressof(o)) for o in self._operands]
        self._list = (_Instruction * len(pairs))(*pairs)
        self._tape = _Tape(ctypes.addressof(self._list), len(pairs), DTYPES[self.dtype], threads, self.rows)
        self._workspace = []
        most = max(
            (lib.mixtura_attention_parts(ctypes.byref(a), self.rows, length) for a in self._attentions), default=0
        )
        parts = self._room(4 * most)
        for attention in self._attentions:  # one after the other: they share it
            attention.parts = parts
        sizes = [lib.mixtura_mixture_workspace(ctypes.byref(m), self.rows, threads) for m in self._mixtures]
        shared = self._room(max(sizes, default=0))
        for mixture in self._mixtures:
            mixture.workspace = shared
        self._tape.scratch_bytes = lib.mixtura_tape_scratch(ctypes.byref(self._tape), self.rows)
        self._tape.scratch = self._room(threads * self._tape.scratch_bytes)
        for name in ("ids", "positions", "starts"):
            setattr(self._tape, name, getattr(self, f"{name}_B").data_ptr())

    def _room(self, size: int) -> int:
        self._workspace.append(torch.empty(size + 64, dtype=torch.uint8))
        return -(-self._workspace[-1].data_ptr() // 64) * 64

    def _keep(self, struct: ctypes.Structure) -> int:
        self._kept.append(struct)
        return ctypes.addressof(struct)

    def _add(self, struct: ctypes.Structure) -> None:
        self._operands.append(struct)

    def _buffer(self, width: int, *, wide: bool = False) -> torch.Tensor:
        made = torch.zeros(self.rows, width, dtype=torch.float32 if wide else self.dtype)
        self._buffers.append(made)
        return made

    def _weight(self, tensor: torch.Tensor) -> int:
        if tensor.dtype != self.dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise NotExpressibleError(
                f"weights of a tape must be contiguous {self.dtype} on the CPU, got {tensor.dtype} on {tensor.device}"
            )
        self.used.append(tensor)
        return tensor.data_ptr()

    def _float(self, tensor: torch.Tensor) -> int:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise NotExpressibleError(f"what a tape reads in float32 must be contiguous float32, got {tensor.dtype}")
        self.used.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Norm | None) -> Any:
        if norm is None:
            return NormStruct()
        tensors = [t for t in (norm.weight, norm.bias) if t is not None]
        wide = self.dtype != torch.float32 and any(t.dtype == torch.float32 for t in tensors)
        take = self._float if wide else self._weight
        weight, bias = (None if t is None else take(t) for t in (norm.weight, norm.bias))
        return NormStruct(weight, bias, norm.eps, norm.offset, {"rms": 1, "layer": 2}[norm.kind], wide)

    def _linear(self, linear: Linear | FewBits) -> Any:
        if isinstance(linear, FewBits):
            self.used += linear.tensors
            bias = None if linear.bias_N is None else self._weight(linear.bias_N)
            return LinearStruct(None, bias, self._keep(linear.struct), linear.out, linear.inputs)
        (N, K), wide = linear.weight_NK.shape, linear.weight_NK.dtype == torch.float32
        take = self._float if wide else self._weight
        pointers = [None if t is None else take(t) for t in (linear.weight_NK, linear.bias_N)]
        return LinearStruct(*pointers, None, N, K, wide and self.dtype != torch.float32)


def few_bits_product(linear: FewBits, x_TK: torch.Tensor) -> torch.Tensor:
    """x_TK times the transposed weight, plus the bias; (T, N) in the type of x."""
    outs = []
    for x_BK in x_TK.contiguous().split(MAX_ROWS):  # type: ignore[no-untyped-call]
        if not len(x_BK):
            continue
        tape = Tape(x_TK.dtype, len(x_BK))
        (out_BN,) = tape.linears(x_BK, None, [linear])
        tape.run(1)
        outs.append(out_BN.to(x_TK.dtype))
    return torch.cat(outs) if outs else x_TK.new_empty(0, linear.out)


def check_selection(spec: SelectionSpec) -> None:
    """Raise ``NotExpressibleError`` if the spec asks for more than the operation of a mixture does."""
    same = ("p", "groups", "null_experts", "weight_on")
    other = [name for name in same if getattr(spec, name) != getattr(_SELECTION, name)]
    other += ["renormalize"] if spec.renormalize not in (None, 1) else []
    other += [name for name in ("eps", "norm_min") if getattr(spec, name) > 1e-9]  # less changes nothing in float32
    other += ["score"] if spec.score not in ("softmax", "sigmoid") else []
    if other:
        raise NotExpressibleError(f"a tape selects without {', '.join(other)}, got {spec}")


def read_bandwidth(tensor: torch.Tensor) -> float:
    """Bytes a second at which all threads read it now; the limit of what a decode step can do.

    Args:
        tensor: contiguous, larger than the caches of the processor.
    """
    return float(_library().mixtura_read_bandwidth(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads()))


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib
