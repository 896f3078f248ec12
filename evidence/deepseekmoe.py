"""Finer experts, and a shared one: better at the same parameters and the same work?

The published models have 16 to 64 experts; here 8 of width 64, 2 a token, become 32 of width 16, 8 a token, or 31 of
which 7 are chosen and one that is always on. Redundancy: how much worse the loss is when every token has to do without
the eighth of the experts that it scores highest and takes the next ones instead; routers whose experts have substitutes
lose less.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, TOTAL, mixture, run
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out
from mixtura.nn import LinearGate

PLAIN, FINE, SHARED = "8 experts, 2 a token", "32 of a quarter, 8 a token", "31 of a quarter, 7 a token, 1 shared"
BALANCE = {"load-balancing": 0.01}
LOST = "bits per byte without the best eighth of the experts"


def train_and_disable(*, rows=HELD_OUT, **config):
    """Also the loss if every token does without the experts that it scores highest, an eighth of all."""
    run = fit(**config)
    found = figures(run, hold_out(run, rows))
    for module in run.model.modules():
        if isinstance(module, LinearGate):
            module.register_forward_hook(_without_best)
    return {**found, LOST: figures(run, hold_out(run, rows))[FIGURE]}


def _without_best(gate, inputs, logits_TE):
    best = logits_TE.topk(max(1, round(logits_TE.shape[-1] / 8))).indices
    return logits_TE.scatter(-1, best, float("-inf"))


@evidence(
    "deepseekmoe",
    claim="At equal parameters and equal work, experts cut into quarters are better by 0.01 bits per byte or more, and "
    "losing the best ones hurts them more: they are less redundant.",
    source="Dai et al., arXiv:2401.06066",
    figure="bits per byte, lower is better",
    setting=SETTING,
)
def measure(lab: Lab) -> Verdict:
    """Plain, finer, finer with a shared expert; dense and random."""
    run(lab, PLAIN, mixture("topk-softmax", k=2), train_and_disable, balance=BALANCE)
    fine = {"layer": "deepseekmoe", "width": 64, "num_experts": 8, "k": 2, "segments": 4, "renormalize": 1.0}
    run(lab, FINE, {**fine, "shared": 0}, train_and_disable, balance=BALANCE)
    run(lab, SHARED, {**fine, "shared": 1}, train_and_disable, balance=BALANCE)
    run(lab, ACTIVE, {"dense": 128})
    run(lab, TOTAL, {"dense": 8 * 64})
    run(lab, RANDOM, mixture("random", k=2))
    gains = [lab.difference(FIGURE, name, PLAIN) for name in (FINE, SHARED)]
    lost = {name: lab.mean(LOST, name) - lab.mean(FIGURE, name) for name in (PLAIN, FINE, SHARED)}
    better = any(gain.mean <= -0.01 and gain.high < 0 for gain in gains)
    hurt = min(lost[FINE], lost[SHARED]) > lost[PLAIN]
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[better + hurt],
        f"Quarters minus whole experts are {gains[0]} bits per byte, with a shared one {gains[1]}; without the best "
        f"eighth of their experts whole ones lose {lost[PLAIN]:.3f}, quarters {lost[FINE]:.3f}, with a shared one "
        f"{lost[SHARED]:.3f}.",
    )
