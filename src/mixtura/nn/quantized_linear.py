"""A linear layer whose weight has 8 or 4 bits: the same module, under another class.

In place of the weight it has three parameters: codes under the name of the weight, ``weight_scale`` and, where groups
have a zero of their own, ``weight_zero``. It computes in the library, else (another device or type, gradients) in torch
on a weight that exists for that long.

T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixtura.core.errors import MixturaError, NotExpressibleError
from mixtura.nn.backends.native.experts import is_transformed, is_watched
from mixtura.nn.backends.native.library import ExpertsStruct, library
from mixtura.nn.backends.native.quantized import CodesStruct, QuantizedStruct
from mixtura.nn.backends.native.tape import DTYPES, FewBits, few_bits_product
from mixtura.nn.experts.quantization import SCALE_DTYPES, Codes, Quantization, check, dequantize, quantize

_NO_WEIGHT = "a quantized layer has codes in place of its weight (dequantized() gives the weight)"


class CodesError(MixturaError, AttributeError):
    """The weight of a layer was asked for that has codes of few bits in its place."""


class CodedWeight:
    """What others see as the weight of a ``QuantizedLinear``: its type, device and shape, but no values.

    Codes that are taken for weights would make nonsense, and a tensor made of them would not notice what is written.

    Raises:
        CodesError: if anything else is asked for, or anything is computed of it.
    """

    def __init__(self, linear: QuantizedLinear, device: torch.device) -> None:
        self.dtype, self.device = linear.weight_dtype, device
        self.shape = torch.Size((linear.out_features, linear.in_features))

    def __getattr__(self, name: str) -> Any:
        raise CodesError(f"{_NO_WEIGHT}, which has no {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CodesError(f"{_NO_WEIGHT}, which {getattr(func, '__name__', func)!r} cannot use")


class QuantizedLinear(nn.Linear):
    """What ``quantize_linear`` makes of a linear layer; it is not built otherwise.

    Attributes:
        quantization: how.
        weight_dtype: type that the weight had, converted since as the model was.
        is_loading: whether codes are still to come; who brings them sets it to False then.
    """

    quantization: Quantization
    weight_dtype: torch.dtype
    is_loading: bool

    def __getattr__(self, name: str) -> Any:
        """The weight is a ``CodedWeight``, and the parameter of that name only while codes are loaded."""
        found: Any = super().__getattr__(name)
        return CodedWeight(self, found.device) if name == "weight" and not self.is_loading else found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N)."""
        x_TK = x.reshape(-1, self.in_features)
        gradients = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        if self._is_native(x_TK) and not gradients:
            return few_bits_product(self.few_bits(), x_TK).view(*x.shape[:-1], self.out_features)
        if gradients:
            return checkpoint(self._in_torch, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._in_torch(x)

    def codes(self) -> Codes:
        """Those of the weight."""
        names = ("weight", "weight_scale", "weight_zero")
        return Codes(*(self._parameters.get(name) for name in names))  # type: ignore[arg-type]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) as it was before, up to rounding."""
        return dequantize(self.codes(), (self.out_features,), self.in_features, self.quantization)[0].to(dtype)

    def coded_weights(self) -> dict[int, int]:
        """How many weights each parameter that holds some of their codes stands for, by its id."""
        codes, *others = self.codes()
        return {id(codes): self.in_features * self.out_features, **dict.fromkeys(map(id, others), 0)}

    def few_bits(self) -> FewBits:
        """The layer as an operation of a tape reads it; its tensors must outlive that."""
        how, codes = self.quantization, [t for t in self.codes() if t is not None]
        pointers = CodesStruct(*(t.data_ptr() for t in codes))
        form = (how.bits, how.group_size, how.scale_dtype == "float16", how.levels)
        struct = QuantizedStruct(ExpertsStruct(), pointers, CodesStruct(), *form)
        return FewBits(struct, self.out_features, self.in_features, tuple(codes), self.bias)

    def _in_torch(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def _is_native(self, x_TK: torch.Tensor) -> bool:
        if is_watched() or is_transformed() or torch.is_autocast_enabled("cpu"):
            return False
        tensors = [x_TK, *self.parameters()]
        alike = x_TK.dtype in DTYPES and (self.bias is None or self.bias.dtype == x_TK.dtype)
        return alike and library() is not None and all(t.device.type == "cpu" for t in tensors)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Scales keep their type, whatever type the model is converted to: they belong to the codes."""
        scale: torch.Tensor = self.weight_scale
        self.weight_dtype = fn(scale.new_empty(0, dtype=self.weight_dtype)).dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            return tensor.to(made.device) if tensor is scale and made.dtype != tensor.dtype else made

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


@torch.no_grad()
def quantize_linear(linear: nn.Linear, how: Quantization) -> None:
    """Quantize the weight of a linear layer in place; on the meta device it gets its new form and no values.

    Raises:
        NotExpressibleError: if it is no plain ``nn.Linear``.
        OptionError: if the weight cannot be quantized.
    """
    if type(linear) is not nn.Linear:
        raise NotExpressibleError(f"a plain Linear can be quantized, got {type(linear).__name__}")
    linear.weight_dtype, linear.is_loading = linear.weight.dtype, linear.weight.is_meta  # type: ignore[assignment]
    codes = quantize_matrix(linear.weight, how)
    for suffix, tensor in zip(("", "_scale", "_zero"), codes, strict=True):
        if tensor is not None:
            linear.register_parameter("weight" + suffix, nn.Parameter(tensor, requires_grad=False))
    linear.quantization = how  # type: ignore[assignment]
    linear.__class__ = QuantizedLinear


def check_linear(linear: nn.Linear, how: Quantization, where: str) -> None:
    """Raise the ``OptionError`` that ``quantize_linear`` would, with the name of the layer, and change nothing."""
    check(f"{where}.weight", linear.weight.detach(), functools.partial(quantize, how=how))


def quantize_matrix(weight_NK: torch.Tensor, how: Quantization) -> Codes:
    """Codes of one matrix; on the meta device only their shapes."""
    if not weight_NK.is_meta:
        return quantize(weight_NK, how)
    empty = weight_NK.new_empty
    codes, scales = how.shapes((len(weight_NK),), weight_NK.shape[1])
    zeros = empty(scales, dtype=torch.uint8) if how.zero_point else None
    return Codes(empty(codes, dtype=torch.uint8), empty(scales, dtype=SCALE_DTYPES[how.scale_dtype]), zeros)


@torch.no_grad()
def dequantize_linear(linear: QuantizedLinear, dtype: torch.dtype | None = None) -> None:
    """Give a quantized layer a weight again, equal to its codes up to rounding, in place.

    Args:
        linear: quantized.
        dtype: of the weight; None is the type that it had, converted since as the model was.
    """
    weight_NK = linear.dequantized(dtype or linear.weight_dtype)
    for name in ("weight_scale", "weight_zero"):
        linear._parameters.pop(name, None)
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    linear.register_parameter("weight", nn.Parameter(weight_NK))
    del linear.quantization, linear.weight_dtype, linear.is_loading
