"""Balance by a bias that chooses and never weighs, against balance losses of three strengths.

The published claim is about models of 1 and 3 billion parameters: balance as good as a loss gives, without what the
loss costs. Here 16 experts, 2 a token. The bias moves by 0.001 a step in the paper; 1200 steps are few for that, so ten
times the rate is tried as well, in an arm of its own.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, mixture, run

EXPERTS = 16
BIAS, FAST = "bias, rate 0.001", "bias, rate 0.01"
LOSSES = {"no balance": 0.0, "loss 0.001": 1e-3, "loss 0.01": 1e-2}


@evidence(
    "aux-loss-free-bias",
    claim="A selection bias keeps MaxVio under 0.2, with a loss no worse than that of the best of three "
    "balance losses (to 0.02 bits per byte).",
    source="Wang et al., arXiv:2408.15664",
    figure="bits per byte, lower is better",
    setting=SETTING + "; here 16 experts of width 64",
)
def measure(lab: Lab) -> Verdict:
    """Two rates of the bias, three coefficients of the loss."""
    for name, coefficient in LOSSES.items():
        terms = {"load-balancing": coefficient} if coefficient else None
        run(lab, name, mixture("topk-softmax", num_experts=EXPERTS, k=2), balance=terms)
    for name, rate in ((BIAS, 1e-3), (FAST, 1e-2)):
        run(lab, name, mixture("aux-loss-free-bias", num_experts=EXPERTS, k=2, rate=rate))
    run(lab, ACTIVE, {"dense": 128})
    run(lab, RANDOM, mixture("random", k=2))
    best = min(LOSSES, key=lambda name: lab.mean(FIGURE, name))
    gaps = {name: lab.difference(FIGURE, name, best) for name in (BIAS, FAST)}
    uneven = {name: lab.mean("MaxVio", name) for name in gaps}
    found = max((uneven[name] < 0.2) + (gap.high <= 0.02) for name, gap in gaps.items())
    told = "; ".join(
        f"{name}: MaxVio {uneven[name]:.2f}, {gap} bits per byte from {best}" for name, gap in gaps.items()
    )
    losses = ", ".join(f"{lab.mean('MaxVio', name):.2f} with {name}" for name in LOSSES)
    return Verdict(["does not hold here", "partly", "holds"][found], f"{told}; MaxVio is {losses}.")
