"""Weights of 8 or 4 bits: the best codes for given groups, and how they lie in memory and on disk.

    weight = scale * (code - zero)        one scale, and one zero if asked for, for each row and group of inputs

A group's scale is searched: of a few clippings the one whose least-squares scale leaves the smallest squared error.

N rows (outputs), K inputs, G groups, P panels of 16 rows. Rows and inputs are filled up to 16 and 32; within a block of
32 inputs four inputs of a row lie side by side, and the 16 rows of a panel after one another; of 4 bits inputs 8i..8i+3
are in the low halves of bytes and 8i+4..8i+7 in the high ones. The library of ``backends.native`` multiplies them so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from mixtura.core.errors import OptionError

PANEL, BLOCK = 16, 32
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_NOT_FINITE = "weights must be finite to be quantized, got NaN or infinity"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale: 32, 64 or 128.
        zero_point: whether each group has a zero of its own; else codes lie around the middle.
        scale_dtype: "float16" or "float32".
        activation_bits: 16 keeps tokens exact to about 1e-5 in the library; 8 is up to twice as fast for many tokens
            and rounds them to 127 levels in blocks of 32. None: 16 at 8 bits, 8 at 4 bits, whose own error is larger
            by far.

    Raises:
        OptionError: for any other value.
    """

    bits: int = 8
    group_size: int = 32
    zero_point: bool = False
    scale_dtype: str = "float16"
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        accepted = {
            "bits": (8, 4),
            "group_size": GROUP_SIZES,
            "zero_point": (False, True),
            "scale_dtype": tuple(SCALE_DTYPES),
            "activation_bits": (None, 8, 16),
        }
        for name, values in accepted.items():
            value = getattr(self, name)
            if not any(value == one and type(value) is type(one) for one in values):
                raise OptionError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")

    @property
    def middle(self) -> int:
        """The code of 0 where groups have no zero of their own."""
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> int:
        """Largest whole number that tokens are rounded to."""
        return 127 if (self.activation_bits or (8 if self.bits == 4 else 16)) == 8 else 32767

    def shapes(self, rows: tuple[int, ...], inputs: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Shapes of codes and of scales, of matrices with that many rows one below the other."""
        panels, blocks = sum(map(_panels, rows)), -(-inputs // BLOCK)
        return (panels, blocks * BLOCK * PANEL * self.bits // 8), (panels, -(-inputs // self.group_size), PANEL)


class Codes(NamedTuple):
    """Quantized matrices, panels of all of them one below the other.

    Attributes:
        codes: uint8, (P, bytes of a panel).
        scales: (P, G, 16).
        zeros: uint8, (P, G, 16), or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def join_codes(parts: Sequence[Codes], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Codes:
    """Codes, scales and zeros of several, each joined by ``torch.cat`` or ``torch.stack``."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Codes(join([p.codes for p in parts]), join([p.scales for p in parts]), join(zeros) if zeros else None)


def quantize(weight_NK: torch.Tensor, how: Quantization) -> Codes:
    """Find codes, scales and zeros of one matrix, and pack them.

    Raises:
        OptionError: if a weight is not finite, or too large for a scale in float16.
    """
    N, K = weight_NK.shape
    groups_NGS = F.pad(weight_NK.float(), (0, -K % how.group_size)).view(N, -1, how.group_size)
    if not groups_NGS.isfinite().all():
        raise OptionError(_NOT_FINITE)
    scale_NG1, zero_NG1 = _with_zero(groups_NGS, how) if how.zero_point else _around_middle(groups_NGS, how)
    scale_NG1 = scale_NG1.to(SCALE_DTYPES[how.scale_dtype])
    if not scale_NG1.isfinite().all():
        raise OptionError(f"weights up to {float(weight_NK.abs().max()):.3g} need scale_dtype='float32', got 'float16'")
    codes_NK = _codes(groups_NGS, scale_NG1.float(), zero_NG1, how).view(N, -1)[:, : K + -K % BLOCK]
    zeros_NG = zero_NG1.expand_as(scale_NG1)[..., 0].to(torch.uint8) if how.zero_point else None
    return _pack(codes_NK.to(torch.uint8), scale_NG1[..., 0], zeros_NG, how)


def check(name: str, weight: torch.Tensor, trial: Callable[[torch.Tensor], Any]) -> None:
    """Find in a small part of its time whether a weight can be quantized; on the meta device it can.

    A scale is at most a fifth of its group's largest weight, so that only weights that are larger than any number in
    float16 can be too large for one; they are quantized on trial.

    Args:
        name: of the weight, for errors.
        weight: a matrix, or a stack of them.
        trial: what quantizes one of the matrices.

    Raises:
        OptionError: if it cannot.
    """
    if weight.is_meta or not weight.numel():
        return
    low, high = (float(end) for end in weight.aminmax())
    try:
        if not math.isfinite(high - low):
            raise OptionError(_NOT_FINITE)
        if max(-low, high) > torch.finfo(torch.float16).max:
            for matrix in weight[None] if weight.ndim == 2 else weight:
                trial(matrix)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None


def dequantize(codes: Codes, rows: tuple[int, ...], inputs: int, how: Quantization) -> list[torch.Tensor]:
    """Matrices (N, K) in float32, one for each number of rows."""
    blocks = codes.codes.shape[1] * 8 // (how.bits * PANEL * BLOCK)
    scales, zeros = (
        None if t is None else t.float().repeat_interleave(how.group_size, 1)[:, : blocks * BLOCK]
        for t in (codes.scales, codes.zeros)
    )
    assert scales is not None
    weights = scales * (_unpack(codes.codes, how.bits) - (how.middle if zeros is None else zeros))
    panels = weights.transpose(1, 2).split([_panels(n) for n in rows])  # type: ignore[no-untyped-call]
    return [part.reshape(-1, blocks * BLOCK)[:n, :inputs] for part, n in zip(panels, rows, strict=True)]


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


def _codes(
    groups_NGS: torch.Tensor, scale_NG1: torch.Tensor, zero_NG1: torch.Tensor, how: Quantization
) -> torch.Tensor:
    """The nearest codes; that of 0 where the scale is 0."""
    inverse = torch.where(scale_NG1 == 0, 0, 1 / scale_NG1)
    return (groups_NGS * inverse + zero_NG1).round_().clamp_(0, 2 * how.middle - 1)


def _around_middle(groups_NGS: torch.Tensor, how: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
    """The value farthest from 0 gets a code near the lower end, of which there is one more."""
    farthest = groups_NGS.gather(-1, groups_NGS.abs().argmax(-1, keepdim=True))
    middle = groups_NGS.new_full((1, 1, 1), how.middle)
    ends = [how.middle + 0.1 * i for i in range(-12, 10)] if how.bits == 4 else [how.middle, how.middle - 0.5]
    return _best(groups_NGS, [(farthest / -end, middle) for end in ends], how)


def _with_zero(groups_NGS: torch.Tensor, how: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
    """From the lowest to the highest value, 0 among them; both ends clipped a little or not."""
    low, high = groups_NGS.amin(-1, keepdim=True).clamp(max=0), groups_NGS.amax(-1, keepdim=True).clamp(min=0)
    last = 2 * how.middle - 1
    candidates = []
    for a in (1.0, 0.92, 0.84, 0.76) if how.bits == 4 else (1.0,):
        for b in (1.0, 0.92, 0.84, 0.76) if how.bits == 4 else (1.0,):
            scale = (high * b - low * a) / last
            candidates.append((scale, torch.where(scale == 0, 0, -low * a / scale).round().clamp(0, last)))
    return _best(groups_NGS, candidates, how)


def _best(
    groups_NGS: torch.Tensor, candidates: list[tuple[torch.Tensor, torch.Tensor]], how: Quantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scales and zeros the one whose codes explain most, with the least-squares scale of these codes.

    Codes q around their zero and the best scale s = wq / qq leave the error ww - wq^2 / qq.
    """
    best = groups_NGS.new_full((*groups_NGS.shape[:2], 1), -1.0)
    scale_NG1, zero_NG1 = torch.zeros_like(best), torch.zeros_like(best)
    for scale, zero in candidates:
        q = _codes(groups_NGS, scale, zero, how).sub_(zero)
        wq, qq = (groups_NGS * q).sum(-1, keepdim=True), q.square().sum(-1, keepdim=True).clamp_(min=1)
        better = wq.square() / qq > best
        best = torch.where(better, wq.square() / qq, best)
        scale_NG1, zero_NG1 = torch.where(better, wq / qq, scale_NG1), torch.where(better, zero, zero_NG1)
    return scale_NG1, zero_NG1


def _pack(codes_NK: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor | None, how: Quantization) -> Codes:
    N, K = codes_NK.shape
    below = (0, 0, 0, -N % PANEL)
    codes = F.pad(codes_NK, below, value=how.middle)
    if how.bits == 8:
        packed = codes.view(-1, PANEL, K // 4, 4).transpose(1, 2)
    else:
        halves = codes.view(-1, PANEL, K // 8, 2, 4).transpose(1, 2)
        packed = halves[..., 0, :] | halves[..., 1, :] << 4
    scales, zeros = (
        None if t is None else F.pad(t, below).view(-1, PANEL, t.shape[1]).transpose(1, 2).contiguous()
        for t in (scales_NG, zeros_NG)
    )
    assert scales is not None
    return Codes(packed.reshape(len(packed), -1), scales, zeros)


def _unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as float32, (P, inputs, 16)."""
    if bits == 4:
        quads = codes.view(len(codes), -1, 1, PANEL, 4)
        codes = torch.cat([quads & 15, quads >> 4], 2)
    return codes.reshape(len(codes), -1, PANEL, 4).transpose(2, 3).reshape(len(codes), -1, PANEL).float()
