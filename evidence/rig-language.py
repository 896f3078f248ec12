"""What the small language model can tell apart: effects that are known, and the smallest difference that shows.

Twice the width of a dense layer is better than the width, and a learned router than a random one; a rig that does not
see these sees nothing. The smallest difference is the one that paired seeds show in four of five tries.
"""

import itertools

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.intervals import deviation, smallest_difference
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, TOP2, mixture, run

DOUBLE = "dense, twice the width"


@evidence(
    "rig-language",
    claim="R-LM-S tells a dense layer from one of twice the width, and a learned router from a random one.",
    source="the rig itself",
    figure="bits per byte, lower is better",
    setting=SETTING,
    seeds=5,
)
def measure(lab: Lab) -> Verdict:
    """Two known effects, and the spread of differences between arms."""
    run(lab, ACTIVE, {"dense": 128})
    run(lab, DOUBLE, {"dense": 256})
    run(lab, TOP2, mixture("topk-softmax", k=2), balance={"load-balancing": 0.01})
    run(lab, RANDOM, mixture("random", k=2))
    wider, learned = lab.difference(FIGURE, DOUBLE, ACTIVE), lab.difference(FIGURE, TOP2, RANDOM)
    spreads = [_spread(lab, *pair) for pair in itertools.combinations(lab.arms, 2)]
    spread = max(spreads)
    found = (wider.high < 0) + (learned.high < 0)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"Twice the width makes {wider} bits per byte, a learned router {learned}. Differences of two arms deviate by "
        f"{min(spreads):.3f} to {spread:.3f} between seeds; with the larger one 3 seeds show differences from "
        f"{smallest_difference(spread, 3):.3f} on and 5 from {smallest_difference(spread, 5):.3f} on.",
    )


def _spread(lab: Lab, one: str, other: str) -> float:
    pairs = list(zip(lab.arms[one].values(FIGURE), lab.arms[other].values(FIGURE), strict=True))
    return deviation([a - b for a, b in pairs]) if len(pairs) > 1 else 0.0
