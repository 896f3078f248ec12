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
        "float32 or bfloat16 on the CPU, weights contiguous, an activation of the library, any number of tokens",
        "native",
        "forward 1.2 to 5.9 times as fast as torch's products one by one on every point of benchmarks/calibrate.py; with "
        "gradients 0.8 to 2.1 times",
    ),
    Rule("all else", "sorted", "the library cannot; ``why_not`` of mixtura.nn.backends.native has the reason"),
)
