"""Who computes a call of the backend ``mixtura``: the rules as data, the first one that fits counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        when: which calls it is about.
        takes: the backend: "native", or "sorted", which is torch.
        because: what was measured, or what it cannot do.
    """

    when: str
    takes: str
    because: str


RULES = (
    Rule(
        "weights that autocast brings to another type",
        "sorted",
        "the library needs all experts in that type, which took 1.7 (64 tokens) to 10 times (one) as long",
    ),
    Rule(
        "float32 or bfloat16 on the CPU, weights contiguous, an activation of the library, any number of tokens",
        "native",
        "forward 1.15 to 5.8 times as fast as sorted, with gradients 0.85 (one token) to 2.1 times, on one thread of "
        "an EPYC with avx512_bf16: benchmarks/calibration.json",
    ),
    Rule("all else", "sorted", "the library cannot; ``why_not`` of mixtura.nn.backends.native has the reason"),
)
