"""Linear layers and attention of few tokens in the library, one operation at a time, whoever calls torch's functions.

Where a whole step cannot be a tape: weights and caches are read where they lie, as a tape reads them.

B rows (sequences), H heads of queries, V heads of keys and values, Q queries of a head, L positions, P width of a head,
N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mixtura.nn.backends.native.experts import is_transformed, is_watched
from mixtura.nn.backends.native.library import library
from mixtura.nn.backends.native.tape import DTYPES, AttentionStruct, LinearStruct

FEW = 8  # tokens; of more torch reads the weights as well once for all
MOST = 64  # queries of a head
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class FewTokens(TorchFunctionMode):
    """Inside of it ``F.linear`` and ``F.scaled_dot_product_attention`` are the library's, where it can compute them.

    Attributes:
        count: calls that the library computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._mask: torch.Tensor | None = None
        self._starts: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, found = kwargs or {}, None
        if func is F.linear:
            found = linear_of_few(*args, **kwargs)
        elif func is F.scaled_dot_product_attention:
            found = self._attention(*args, **kwargs)
        if found is None:
            return func(*args, **kwargs)
        self.count += 1
        return found

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor | None:
        if dropout_p or is_causal or (query.shape[1] != key.shape[1] and not enable_gqa):
            return None
        if attn_mask is not None and attn_mask is not self._mask:  # layers share it
            self._mask, self._starts = attn_mask, _starts(attn_mask, len(query), key.shape[2])
        starts_B = self._starts if attn_mask is not None else torch.zeros(len(query), dtype=torch.int64)
        return None if starts_B is None else attend(query, key, value, starts_B, scale)


def linear_of_few(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor | None:
    """x times the transposed weight plus the bias, of up to ``FEW`` rows; None if the library cannot."""
    tensors = [t for t in (x, weight_NK, bias_N) if t is not None]
    rows = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        return None  # torch broadcasts it, or says what is wrong
    if weight_NK.ndim != 2 or not 1 <= rows <= FEW or x.shape[-1] != weight_NK.shape[1] or not _are_plain(tensors):
        return None
    out = x.new_empty(*x.shape[:-1], len(weight_NK))
    bias = None if bias_N is None else bias_N.data_ptr()
    struct = LinearStruct(weight_NK.data_ptr(), bias, None, *weight_NK.shape)
    places = (x.data_ptr(), out.data_ptr(), rows, DTYPES[x.dtype], torch.get_num_threads())
    _library().mixtura_linear_rows(ctypes.byref(struct), *places)
    return out


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts_B: torch.Tensor, scale: float | None
) -> torch.Tensor | None:
    """Attention of a few queries a head that all see the same, (B, H, Q, P); None if the library cannot.

    Args:
        query: (B, H, Q, P). Heads that share keys may stand in Q, as transformers packs them.
        key: (B, V, L, P); heads may lie apart, as in a cache that has room.
        value: the same.
        starts_B: first positions that are seen, below L.
        scale: of the scores, None for 1 / sqrt(P).
    """
    if query.ndim != 4 or query.shape[2] > MOST or key.shape != value.shape or key.stride() != value.stride():
        return None
    if key.ndim != 4 or (key.shape[0], key.shape[3]) != (query.shape[0], query.shape[3]):
        return None  # torch broadcasts rows, or says what is wrong
    (B, H, Q, P), (_, V, L, _), query = query.shape, key.shape, query.contiguous()
    if B > FEW or P % 16 or H % V or not _lies_in_a_cache(key) or {key.dtype, value.dtype} != {query.dtype}:
        return None
    if not _are_plain([query]):
        return None
    wide, out, threads = query.float().contiguous(), torch.empty_like(query), torch.get_num_threads()
    struct = AttentionStruct(query=wide.data_ptr(), out=out.data_ptr(), keys=key.data_ptr(), values=value.data_ptr())
    struct.capacity, struct.heads, struct.groups, struct.width = key.stride(1) // P, H * Q, V, P
    struct.scale = P**-0.5 if scale is None else scale
    lib, call = _library(), ctypes.byref(struct)
    workspace = torch.empty(lib.mixtura_attend_workspace(call, B, L, threads) + 64, dtype=torch.uint8)
    aligned = -(-workspace.data_ptr() // 64) * 64
    lib.mixtura_attend(call, starts_B.data_ptr(), aligned, B, L, DTYPES[query.dtype], threads)
    return out


def _are_plain(tensors: list[torch.Tensor]) -> bool:
    dtype = tensors[0].dtype
    here = all(type(t) in _PLAIN and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    alike = here and all(t.dtype == dtype for t in tensors)
    seen = is_watched() or is_transformed() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return alike and dtype in DTYPES and not seen


def _lies_in_a_cache(key: torch.Tensor) -> bool:
    """Whether positions of a head follow each other, and heads and rows lie equally far apart."""
    of_row, of_head, of_position, of_unit = key.stride()
    V, P = key.shape[1], key.shape[3]
    steps = of_unit == 1 and of_position == P and of_head % P == 0 and of_row == V * of_head
    return type(key) in _PLAIN and key.device.type == "cpu" and steps


def _starts(mask: torch.Tensor, B: int, L: int) -> torch.Tensor | None:
    """First position that each row sees; None if it does not see all behind it, or the mask has another form."""
    if mask.dtype != torch.bool or mask.shape[-3:] != (1, 1, L) or mask.shape[0] not in (1, B) or mask.ndim != 4:
        return None
    seen_BL = mask[:, 0, 0].expand(B, L)
    starts_B = L - seen_BL.sum(1)
    behind = torch.arange(L)[None] >= starts_B[:, None]
    return starts_B if bool((behind == seen_BL).all()) and int(starts_B.max()) < L else None


@functools.cache
def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.mixtura_linear_rows.argtypes = [pointer, pointer, pointer, i64, i32, ctypes.c_int]
    lib.mixtura_attend.argtypes = [pointer, pointer, pointer, i64, i64, i32, ctypes.c_int]
    lib.mixtura_attend_workspace.argtypes, lib.mixtura_attend_workspace.restype = [pointer, i64, i64, ctypes.c_int], i64
    return lib
