"""Parameters of a model: all, and those that work on one token.

A mixture of E experts of which a token chooses k counts its k largest experts as active; everything else counts whole,
embeddings too. Tied weights count once, and codes of few bits as the weights that they stand for.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mixtura.hf.families import selection_spec
from mixtura.hf.seat import Seat
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.experts.quantized import QuantizedExperts
from mixtura.nn.mixture import Mixture
from mixtura.nn.quantized_linear import QuantizedLinear


class Counts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: all.
        active: those that a token passes, at most.
        trainable: those that require a gradient.
    """

    total: int
    active: int
    trainable: int


def count_parameters(model: nn.Module) -> Counts:
    """Count; native mixtures are found by their stacked experts, ours by their class.

    Raises:
        NotExpressibleError: if it is not known how many experts of a native mixture a token chooses.
    """
    total = _size(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seats = [(block, seat) for block in model.modules() for seat in block.children() if isinstance(seat, Seat)]
    seated = {id(beside): seat.router.slots for block, seat in seats for beside in block.children()}
    idle, inside = 0, set()
    for module in model.modules():
        if isinstance(module, Mixture):
            idle += _idle(_sizes(module.experts), module.router.slots)  # type: ignore[union-attr, arg-type]
            inside.update(id(part) for part in module.modules())
        elif id(module) not in inside and _is_native(module):
            idle += _idle(_sizes(module), seated.get(id(module)) or _native_k(model))
    return Counts(total, total - idle, trainable)


def _sizes(experts: nn.Module) -> list[int]:
    """Parameters of each expert."""
    if isinstance(experts, ExpertGroup):
        return [size for form in experts.forms for size in _sizes(form)]
    number = int(experts.num_experts)  # type: ignore[arg-type]
    return [_size(experts) // number] * number


def _size(module: nn.Module) -> int:
    coded: dict[int, int] = {}  # scales and zeros count nothing
    for part in module.modules():
        if isinstance(part, QuantizedExperts | QuantizedLinear):
            coded |= part.coded_weights()
    return sum(coded.get(id(parameter), parameter.numel()) for parameter in module.parameters())


def _idle(sizes: list[int], k: int) -> int:
    return sum(sorted(sizes, reverse=True)[k:])


def _is_native(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3 and hasattr(module, "num_experts")


def _native_k(model: nn.Module) -> int:
    k = getattr(model.config, "num_experts_per_tok", None)
    return selection_spec(model.config).k if k is None else int(k)
