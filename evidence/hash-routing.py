"""Hash routing: how much of a mixture's gain needs a learned router?

The published surprise: a fixed table from tokens to experts is about as good as a learned top-1 router. Bytes are too
few to be hashed one by one, so tables are by pairs of bytes. One expert of width 64 a token, out of 8.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, SETTING, TOTAL, mixture, run

HASHED, LEARNED, RANDOM = "hash of two bytes", "top-1, balance 0.01", "random expert"


@evidence(
    "hash-routing",
    claim="A fixed table from tokens to experts is better than a dense layer of equal work, and less than 0.02 bits "
    "per byte behind a learned top-1 router.",
    source="Roller et al., arXiv:2106.04426",
    figure="bits per byte, lower is better",
    setting=SETTING + "; here one expert a token, and the dense layer has the width of one",
)
def measure(lab: Lab) -> Verdict:
    """A table, a learned router, chance, and dense."""
    run(lab, HASHED, mixture("hash-routing", vocabulary=65536), bigrams=True)
    switch = mixture("topk-softmax", k=1, renormalize=None)
    run(lab, LEARNED, switch, balance={"load-balancing": 0.01})
    run(lab, RANDOM, mixture("random", k=1))
    run(lab, ACTIVE, {"dense": 64})
    run(lab, TOTAL, {"dense": 8 * 64})
    gain = lab.difference(FIGURE, HASHED, ACTIVE)
    behind = lab.difference(FIGURE, HASHED, LEARNED)
    chance = lab.difference(FIGURE, HASHED, RANDOM)
    lab.difference(FIGURE, HASHED, TOTAL)
    found = (gain.high < 0) + (behind.high < 0.02)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"The table minus dense is {gain} bits per byte, minus the learned router {behind}, minus "
        f"random experts {chance}.",
    )
