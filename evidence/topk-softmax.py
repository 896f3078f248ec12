"""Top-k softmax routing: a mixture against dense layers at equal work a token, and what happens without balance.

Published at many scales: at equal work a token a mixture learns more than a dense model (Switch, Mixtral), and without
a balance loss few experts do all the work. Here both are asked of a model that trains in half a minute. The dense arm
of equal total size does four times the work a token.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, TOP2, TOTAL, baselines, mixture, run

FREE = "top-2, no balance"


@evidence(
    "topk-softmax",
    claim="At equal work a token, a mixture of 8 experts of which 2 work is better than a dense layer by 0.02 bits per "
    "byte or more; without a balance loss the busiest expert gets more than 3 times its share (MaxVio above 2).",
    source="Fedus et al., arXiv:2101.03961; Jiang et al., arXiv:2401.04088",
    figure="bits per byte, lower is better",
    setting=SETTING,
    seeds=5,
)
def measure(lab: Lab) -> Verdict:
    """Top-2 with and without balance against dense and random."""
    baselines(lab)
    run(lab, FREE, mixture("topk-softmax", k=2))
    gain = lab.difference(FIGURE, TOP2, ACTIVE)
    chance = lab.difference(FIGURE, TOP2, RANDOM)
    bound = lab.difference(FIGURE, TOP2, TOTAL)
    lab.difference(FIGURE, TOP2, FREE)
    free, held = lab.mean("MaxVio", FREE), lab.mean("MaxVio", TOP2)
    better, unbalanced = gain.mean <= -0.02 and gain.high < 0, free > 2
    verdict = {2: "holds", 1: "partly", 0: "does not hold here"}[better + unbalanced]
    return Verdict(
        verdict,
        f"Top-2 minus dense of equal active size is {gain} bits per byte, minus random routing {chance}, minus dense "
        f"of equal total size {bound}; MaxVio is {free:.2f} without and {held:.2f} with balance.",
    )
