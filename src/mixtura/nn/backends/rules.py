"""Who computes a call of the backend ``mixtura``: the rules as data, asked at every call and printed by ``doctor``.

Of the rules that fit a call the first one counts whose backend can compute it. What was measured is in
benchmarks/calibration.json.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Call(NamedTuple):
    """What rules ask.

    Attributes:
        device: type of the tokens' device.
        dtype: that experts are computed in.
        training: whether a gradient is wanted.
        traced: whether a compiler, an export or a mode of torch watches; it may know no numbers.
        cast: whether autocast would bring weights to another type.
        instructions: the library's instruction set, "" without the library.
        slots: of an expert on the average, T K / E.
    """

    device: str
    dtype: torch.dtype
    training: bool
    traced: bool
    cast: bool
    instructions: str
    slots: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table. A condition that is None fits every call.

    Attributes:
        takes: the backend: "native"; "grouped" or "sorted", which are torch.
        because: what was measured, or what it cannot do.
        device, training, traced, cast: see ``Call``.
        dtypes: names of which the call's is one.
        instructions: of which the call's is one.
        slots_from, slots_below: bounds of the slots of an expert; no call that is traced fits then.
    """

    takes: str
    because: str
    device: str | None = None
    dtypes: tuple[str, ...] | None = None
    training: bool | None = None
    traced: bool | None = None
    cast: bool | None = None
    instructions: tuple[str, ...] | None = None
    slots_from: float | None = None
    slots_below: float | None = None

    def fits(self, call: Call) -> bool:
        """Whether the rule is about it."""
        same = all(
            getattr(self, name) in (None, getattr(call, name)) for name in ("device", "training", "traced", "cast")
        )
        among = self.dtypes is None or _name(call.dtype) in self.dtypes
        among = among and (self.instructions is None or call.instructions in self.instructions)
        return same and among and not (call.traced and self._bounds()) and self._holds(call.slots)

    def _holds(self, slots: float) -> bool:
        above = self.slots_from is None or slots >= self.slots_from
        return above and (self.slots_below is None or slots < self.slots_below)

    def _bounds(self) -> list[float]:
        return [n for n in (self.slots_from, self.slots_below) if n is not None]

    @property
    def when(self) -> str:
        """Its conditions, in words."""
        return ", ".join(self._conditions()) or "any call"

    def _conditions(self) -> Iterator[str]:
        if self.device:
            yield f"on {self.device}"
        if self.dtypes:
            yield " or ".join(self.dtypes)
        if self.cast is not None:
            yield "weights that autocast brings to another type" if self.cast else "no weights that autocast casts"
        if self.traced is not None:
            yield "compiled, exported or watched by a mode" if self.traced else "not traced"
        if self.training is not None:
            yield "with gradients" if self.training else "without gradients"
        if self.instructions:
            yield f"by {' or '.join(self.instructions)}"
        if self.slots_from is not None:
            yield f"{self.slots_from:g} slots an expert or more"
        if self.slots_below is not None:
            yield f"less than {self.slots_below:g} slots an expert"


RULES = (
    Rule("native", "one operator a layer, for any number of tokens", device="cpu", traced=True),
    Rule(
        "sorted",
        "the library needs all experts in that type, which took up to 20 times as long (one token of 64 experts)",
        cast=True,
        training=False,
        slots_below=128,
    ),
    Rule(
        "sorted",
        "the same, up to 2.6 times",
        cast=True,
        training=True,
        slots_below=8,
    ),
    Rule(
        "grouped",
        "on one H200 0.9 (one token) to 8 times as fast as sorted, with gradients 1.04 to 11 times",
        device="cuda",
        traced=False,
    ),
    Rule(
        "grouped",
        "1.2 to 2.4 times as fast as native, with a torch that may use all instructions",
        device="cpu",
        dtypes=("float32",),
        training=True,
        instructions=("portable",),
    ),
    Rule(
        "sorted",
        "1.2 (16 slots) to 2.3 times (128) as fast as native, with a torch that may use all instructions",
        device="cpu",
        dtypes=("float32",),
        instructions=("portable",),
        slots_from=8,
    ),
    Rule(
        "grouped",
        "most of the time goes into zeros for experts without a token; 1.17 to 1.28 times as fast as native",
        device="cpu",
        dtypes=("float32",),
        training=True,
        slots_below=1.5,
    ),
    Rule(
        "grouped",
        "the same, 1.2 times",
        device="cpu",
        dtypes=("bfloat16",),
        training=True,
        slots_below=0.2,
    ),
    Rule(
        "native",
        "on one thread 1.2 to 4.6 times as fast as sorted, with gradients 0.95 to 1.5 times as fast as grouped; with "
        "AVX2 or less in bfloat16, which torch then computes slowly, up to 20 times",
        device="cpu",
        dtypes=("float32", "bfloat16"),
    ),
    Rule("sorted", "any type, any device, second gradients, transforms of functions"),
)


def boundaries() -> tuple[float, ...]:
    """Numbers of slots at which another rule may fit, rising."""
    return tuple(sorted({n for rule in RULES for n in rule._bounds()}))


@functools.cache
def fitting(call: Call) -> tuple[Rule, ...]:
    """The rules that fit, in order."""
    return tuple(rule for rule in RULES if rule.fits(call))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
