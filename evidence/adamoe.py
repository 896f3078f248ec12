"""Null experts: fewer true experts a token at the same quality, and more where they are needed?

The paper fine-tunes Mixtral. Here models are trained from the start: top-2 of 8, against 3 slots among 8 true and 8
null experts, which are 1.5 true experts a token at balance (with 4 null experts it would be 2, and nothing saved).
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import FIGURE, SETTING, TOP2, baselines, run
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out

NULLS, TRUE = 8, 8
ADAPTIVE = "3 slots, 8 null experts"
USED, SPREAD = "true experts a token", "deviation of true experts a token"


def train_and_count(*, rows=HELD_OUT, **config):
    """Also the number of true experts a token, and how much it differs between tokens."""
    run = fit(**config)
    held = hold_out(run, rows)
    used = [(routing.indices_TK < TRUE).sum(-1).float() for routing in held.routings]
    counted = {USED: sum(float(n.mean()) for n in used), SPREAD: sum(float(n.std()) for n in used)}
    return {**figures(run, held), **{name: value / len(used) for name, value in counted.items()}}


@evidence(
    "adamoe",
    claim="With null experts a token uses 1.8 true experts or fewer instead of 2, within 0.02 bits per byte of top-2, "
    "and the number differs between tokens.",
    source="Zeng et al., arXiv:2406.13233",
    figure="bits per byte, lower is better",
    setting=SETTING,
)
def measure(lab: Lab) -> Verdict:
    """Null experts against top-2, dense and random."""
    baselines(lab)
    router = {"method": "adamoe", "num_experts": TRUE, "null_experts": NULLS, "k": 3}
    experts = [
        {"method": "feed-forward", "num_experts": TRUE, "width": 64},
        {"method": "zero", "num_experts": NULLS},
    ]
    layer = {"mixture": {"router": router, "experts": experts}}
    run(lab, ADAPTIVE, layer, train_and_count, balance={"null-balance": {"coefficient": 0.01, "null_experts": NULLS}})
    gap = lab.difference(FIGURE, ADAPTIVE, TOP2)
    used, spread = lab.mean(USED, ADAPTIVE), lab.mean(SPREAD, ADAPTIVE)
    found = (used <= 1.8) + (gap.high <= 0.02) + (spread > 0.1)
    return Verdict(
        {3: "holds", 0: "does not hold here"}.get(found, "partly"),
        f"A token uses {used:.2f} true experts (deviation {spread:.2f} between tokens), {gap} bits per byte from "
        "top-2.",
    )
