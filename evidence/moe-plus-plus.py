"""MoE++: experts without computation beside feed-forward ones; as good with fewer calls?

8 feed-forward experts and 2 constant, 1 copy and 1 zero expert, two slots a token, against 8 feed-forward experts, two
slots. The gating residual is asked for apart: how much the variance of the logits differs between the two layers.
"""

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import FIGURE, SETTING, TOP2, baselines, run
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out

FORMS = "8 feed-forward, 4 others"
CALLS, UNEVEN = "feed-forward calls a token", "ratio of the layers' logit variances"


def train_and_count(*, rows=HELD_OUT, **config):
    """Also the feed-forward experts a token, and how unlike the layers' logits are."""
    run = fit(**config)
    held = hold_out(run, rows)
    calls = [float((routing.indices_TK < 8).sum(-1).float().mean()) for routing in held.routings]
    variances = sorted(float(routing.logits_TE.var(-1).mean()) for routing in held.routings)
    return {**figures(run, held), CALLS: sum(calls) / len(calls), UNEVEN: variances[-1] / max(variances[0], 1e-12)}


@evidence(
    "moe-plus-plus",
    claim="With 4 experts without computation a token makes 1.7 feed-forward calls or fewer instead of 2, and the loss "
    "is no worse than 0.02 bits per byte above top-2's.",
    source="Jin et al., arXiv:2410.07348",
    figure="bits per byte, lower is better",
    setting=SETTING,
)
def measure(lab: Lab) -> Verdict:
    """Against top-2, dense and random."""
    baselines(lab)
    layer = {"layer": "moe-plus-plus", "width": 64, "num_experts": 8}
    balance = {"heterogeneous-balance": {"coefficient": 0.01, "zero_computation": 4, "tau": 0.75}}
    run(lab, FORMS, layer, train_and_count, balance=balance)
    gap, calls = lab.difference(FIGURE, FORMS, TOP2), lab.mean(CALLS, FORMS)
    found = (calls <= 1.7) + (gap.high <= 0.02)
    return Verdict(
        {2: "holds", 1: "partly", 0: "does not hold here"}[found],
        f"{calls:.2f} feed-forward calls a token, {gap} bits per byte from top-2; the larger variance of a layer's "
        f"logits is {lab.mean(UNEVEN, FORMS):.1f} times the smaller one.",
    )
