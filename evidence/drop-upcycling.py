"""Drop-upcycling: half of each copy's units drawn anew; worse at first, better in the end?

400 dense steps, then 800 as a mixture of 8 copies, 2 a token, with and without units drawn anew, or dense as before
(half the work). The paper trains for far longer after the conversion; whether the curves cross within this budget is
what is asked.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import FIGURE, RANDOM, SETTING, TOTAL, mixture, run
from mixtura.evidence.rigs.language_upcycling import AT_ONCE, DIVERSITY, EARLY, LATE, RATE, go_on

DENSE, NAIVE, DROPPED = "dense, 800 steps more", "copies", "copies, half drawn anew"


@evidence(
    "drop-upcycling",
    claim="Copies of which half is drawn anew start worse than plain copies and end better, with experts at least "
    "twice as diverse.",
    source="Nakamura et al., arXiv:2502.19261",
    figure="bits per byte, lower is better",
    setting=SETTING + "; upcycled arms: 400 dense steps and 800 more, all at rate 0.003",
)
def measure(lab: Lab) -> Verdict:
    """Plain copies against copies drawn anew in part; dense beside."""
    small = {"dense_steps": 3, "steps": 3, "domains": ["code-python", "code-cpp"], "rows": 8}
    budget = lab.pick({"dense_steps": 400, "steps": 800}, smoke=small)
    mixed = {"balance": {"load-balancing": 0.01}, "options": {"copies": 8, "shards": 1, "k": 2}}
    for name, config in (
        (DENSE, {}),
        (NAIVE, {**mixed, "surgery": "sparse-upcycling"}),
        (DROPPED, {**mixed, "surgery": "drop-upcycling"}),
    ):
        lab.arm(name, go_on, lr=RATE, **config, **budget)
    run(lab, TOTAL, {"dense": 8 * 64})
    run(lab, RANDOM, mixture("random", k=2))
    end = lab.difference(FIGURE, DROPPED, NAIVE)
    start, early, late = (lab.difference(name, DROPPED, NAIVE) for name in (AT_ONCE, EARLY, LATE))
    lab.difference(FIGURE, NAIVE, DENSE)
    dropped, naive = (lab.mean(DIVERSITY, name) for name in (DROPPED, NAIVE))
    found = (start.mean > 0 and end.mean < 0 and end.high < 0) + (dropped >= 2 * naive)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"Drawn anew minus plain copies is {start} bits per byte after the conversion and {end} at the end (training "
        f"loss {early.mean:+.3f} nats in the first and {late.mean:+.3f} in the last tenth); diversity is {dropped:.3f} "
        f"and {naive:.3f}.",
    )
