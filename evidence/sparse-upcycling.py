"""Sparse upcycling: does a dense model that is turned into a mixture learn more from the same extra steps?

800 dense steps, then 400 more: dense as before, as a mixture of copies, or as a mixture from the start for all 1200
steps. "4 copies in halves" has the dense layer's work a token (8 experts of half its width, 2 a token) and computes
what it computed; "8 copies, 2 a token", the published form, does twice the work.

The same once more with a real model: the last two feed-forward layers of SmolLM2-135M, trained on for 60 steps, dense
or as 8 copies.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs import upcycled
from mixtura.evidence.rigs.language_arms import FIGURE, GRID, RANDOM, SETTING, TOP2, TOTAL, mixture, run
from mixtura.evidence.rigs.language_upcycling import AT_ONCE, go_on

DENSE, HALVES, COPIES = "dense, 400 steps more", "4 copies in halves", "8 copies, 2 a token"
REAL_DENSE, REAL_COPIES = "SmolLM2, dense", f"SmolLM2, {COPIES}"
BALANCE = {"load-balancing": 0.01}


@evidence(
    "sparse-upcycling",
    claim="After 400 more steps the upcycled model is better by 0.01 bits per byte or more than the dense one, and "
    "as good as a mixture that was trained from the start (to 0.02).",
    source="Komatsuzaki et al., arXiv:2212.05055",
    figure="bits per byte, lower is better",
    setting=SETTING + "; R-UP-S: last 2 layers of SmolLM2-135M-Instruct, 60 steps of 4 x 128 tokens",
)
def measure(lab: Lab) -> Verdict:
    """Dense on, two forms of copies, and a mixture from the start."""
    small = {"dense_steps": 3, "steps": 3, "domains": ["code-python", "code-cpp"], "rows": 8}
    budget = lab.pick({"dense_steps": 800, "steps": 400}, smoke=small)
    halves, copies = {"copies": 4, "shards": 2, "k": 2}, {"copies": 8, "shards": 1, "k": 2}
    mixed = {"surgery": "sparse-upcycling", "balance": BALANCE}
    for name, config in (
        (DENSE, {}),
        (HALVES, {**mixed, "options": halves}),
        (COPIES, {**mixed, "options": copies}),
    ):
        lab.tuned_arm(name, go_on, grid=GRID, figure=FIGURE, **config, **budget)
    run(lab, TOP2, mixture("topk-softmax", k=2), balance=BALANCE)
    run(lab, TOTAL, {"dense": 8 * 64})
    run(lab, RANDOM, mixture("random", k=2))
    real = real_model(lab, copies)
    gain, more = (lab.difference(FIGURE, name, DENSE) for name in (HALVES, COPIES))
    scratch = lab.difference(FIGURE, HALVES, TOP2)
    kept = lab.difference(AT_ONCE, HALVES, DENSE)
    found = (gain.mean <= -0.01 and gain.high < 0) + (scratch.high <= 0.02)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"At equal work upcycled minus dense is {gain} bits per byte, with twice the work {more}; upcycled minus a "
        f"mixture from the start is {scratch}; the conversion itself changed {kept.mean:.1g}.{real}",
    )


def real_model(lab: Lab, copies: dict) -> str:
    """The last layers of SmolLM2, dense and upcycled; a run that only proves that the script runs has no such model."""
    if lab.smoke:
        return ""
    for name, config in ((REAL_DENSE, {}), (REAL_COPIES, {"options": copies, "balance": BALANCE})):
        lab.tuned_arm(name, upcycled.train, grid={"lr": [2e-4, 5e-4, 1e-3]}, figure=upcycled.FIGURE, **config)
    gain = lab.difference(upcycled.FIGURE, REAL_COPIES, REAL_DENSE)
    return f" On SmolLM2 8 copies minus dense are {gain} nats a token, at twice the work."
