"""How ``doctor`` says what computes experts on this machine, and which of a model's the native library cannot.

D width of the experts' tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mixtura.nn.backends.native import instructions, why_not
from mixtura.nn.backends.native.library import why_no_library
from mixtura.nn.backends.native.quantized import why_not_quantized
from mixtura.nn.backends.rules import RULES, Rule
from mixtura.nn.experts.quantized import QuantizedExperts


@dataclasses.dataclass(frozen=True)
class Computing:
    """What the backend ``mixtura`` does here.

    Attributes:
        no_library: why there is no native library; "" if there is one.
        instructions: the instruction set in use, "" without the library.
        available: all that the processor has, the best first.
        threads: that torch is set to use.
        rules: who computes which calls; the first that fits counts whose backend can.
        left_to_torch: for each reason why the library cannot, the names of the experts.
    """

    no_library: str
    instructions: str
    available: tuple[str, ...]
    threads: int
    rules: tuple[Rule, ...]
    left_to_torch: dict[str, list[str]]


def computing(model: nn.Module) -> Computing:
    """Look at the library and at every stack of experts."""
    name, available = instructions()
    left: dict[str, list[str]] = {}
    if not why_no_library():
        for path, experts in _stacks(model):
            if reason := _why_not(experts):
                left.setdefault(reason, []).append(path)
    return Computing(why_no_library(), name, tuple(available), torch.get_num_threads(), RULES, left)


def computing_lines(found: Computing) -> Iterator[tuple[str, str]]:
    """Beginnings of lines, and what follows."""
    if found.no_library:
        yield "native library: ", f"none: {found.no_library}; torch computes experts"
        return
    others = ", ".join(found.available)
    yield "native library: ", f"{found.instructions} on {found.threads} threads; this processor has {others}"
    for rule in found.rules:
        yield f"{rule.takes}: ", f"{rule.when}: {rule.because}"
    for reason, names in found.left_to_torch.items():
        yield "torch computes: ", f"{', '.join(names)}: {reason}"


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(module, "is_transposed"):
            yield name, module


@torch.no_grad()
def _why_not(experts: Any) -> str:
    """For tokens of the experts' own type."""
    if isinstance(experts, QuantizedExperts):
        dtype = experts.down_proj_bias.dtype if experts.has_bias else torch.float32
        D = next(inputs for name, inputs in experts.inputs.items() if name != "down_proj")
        return why_not_quantized(experts, torch.empty(0, D, dtype=dtype), torch.empty(0, 1))
    down = experts.down_proj
    D = down.shape[2 if experts.is_transposed else 1]
    return why_not(experts, torch.empty(0, D, dtype=down.dtype, device=down.device))
