"""Sparse upcycling: does a dense model that is turned into a mixture learn more from the same extra steps?

800 dense steps, then 400 more: dense as before, as a mixture of copies, or as a mixture from the start for all 1200
steps. "4 copies in halves" has the dense layer's work a token (8 experts of half its width, 2 a token) and computes
what it computed; "8 copies, 2 a token", the published form, does twice the work.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import FIGURE, GRID, RANDOM, SETTING, TOP2, TOTAL, mixture, run
from mixtura.evidence.rigs.language_upcycling import AT_ONCE, go_on

DENSE, HALVES, COPIES = "dense, 400 steps more", "4 copies in halves", "8 copies, 2 a token"
BALANCE = {"load-balancing": 0.01}


@evidence(
    "sparse-upcycling",
    claim="After 400 more steps the upcycled model is better by 0.01 bits per byte or more than the dense one, and "
    "about as good as a mixture that was trained from the start.",
    source="Komatsuzaki et al., arXiv:2212.05055",
    figure="bits per byte, lower is better",
    setting=SETTING,
)
def measure(lab: Lab) -> Verdict:
    """Dense on, two forms of copies, and a mixture from the start."""
    small = {"dense_steps": 3, "steps": 3, "domains": ["code-python", "code-cpp"], "rows": 8}
    budget = lab.pick({"dense_steps": 800, "steps": 400}, smoke=small)
    halves, copies = {"copies": 4, "shards": 2, "k": 2}, {"copies": 8, "shards": 1, "k": 2}
    upcycled = {"surgery": "sparse-upcycling", "balance": BALANCE}
    for name, config in (
        (DENSE, {}),
        (HALVES, {**upcycled, "options": halves}),
        (COPIES, {**upcycled, "options": copies}),
    ):
        lab.tuned_arm(name, go_on, grid=GRID, figure=FIGURE, **config, **budget)
    run(lab, TOP2, mixture("topk-softmax", k=2), balance=BALANCE)
    run(lab, TOTAL, {"dense": 8 * 64})
    run(lab, RANDOM, mixture("random", k=2))
    gain, more = (lab.difference(FIGURE, name, DENSE) for name in (HALVES, COPIES))
    scratch = lab.difference(FIGURE, HALVES, TOP2)
    kept = lab.difference(AT_ONCE, HALVES, DENSE)
    found = (gain.mean <= -0.01 and gain.high < 0) + (scratch.low <= 0.01)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"At equal work upcycled minus dense is {gain} bits per byte, with twice the work {more}; upcycled minus a "
        f"mixture from the start is {scratch}; the conversion itself changed {kept.mean:.1g}.",
    )
