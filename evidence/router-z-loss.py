"""Router z-loss: does it hold the router's logits down and prevent instability, at no cost?

Published for large models that diverge; a model of this size does not. So the rate is four times the usual one, too,
and what is counted is how large logits get and how often the training loss jumps. No rate is tuned: both arms of a pair
have the same.
"""

import statistics

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, budget, mixture
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out, train

RATE, HOT = 3e-3, 1.2e-2
TOP2 = mixture("topk-softmax", k=2)
BALANCE = {"load-balancing": 0.01}


def train_and_watch(*, rows=HELD_OUT, **config):
    """Also the largest logit on held-out text, and jumps: losses 0.5 nats above the median of 50 steps before."""
    run = fit(**config)
    held = hold_out(run, rows)
    jumps = sum(loss > statistics.median(run.losses[n : n + 50]) + 0.5 for n, loss in enumerate(run.losses[50:]))
    largest = max(float(routing.logits_TE.abs().max()) for routing in held.routings)
    return {**figures(run, held), "largest logit": largest, "jumps": jumps}


@evidence(
    "router-z-loss",
    claim="At four times the rate, the z-loss halves the largest logit and leaves no jump of the training loss; at the "
    "usual rate quality does not change.",
    source="Zoph et al., arXiv:2202.08906",
    figure="bits per byte, lower is better",
    setting=SETTING.replace("the rate of every arm is the best of 3 on a seed of its own", "rates 0.003 and 0.012"),
)
def measure(lab: Lab) -> Verdict:
    """With and without, at two rates."""
    for speed, rate in (("usual rate", RATE), ("4 x rate", HOT)):
        for name, terms in (("plain", BALANCE), ("z-loss", {**BALANCE, "router-z-loss": 1e-3})):
            lab.arm(f"{name}, {speed}", train_and_watch, layer=TOP2, lr=rate, balance=terms, **budget(lab))
    lab.arm(ACTIVE, train, layer={"dense": 128}, lr=RATE, **budget(lab))
    lab.arm(RANDOM, train, layer=mixture("random", k=2), lr=RATE, **budget(lab))
    quality = lab.difference(FIGURE, "z-loss, usual rate", "plain, usual rate")
    hot = lab.difference(FIGURE, "z-loss, 4 x rate", "plain, 4 x rate")
    plain, held = (lab.mean("largest logit", f"{name}, 4 x rate") for name in ("plain", "z-loss"))
    before, after = (lab.mean("jumps", f"{name}, 4 x rate") for name in ("plain", "z-loss"))
    tamed, calmer, free = plain >= 2 * held, after < before, quality.low <= 0 <= quality.high
    verdict = "partly" if tamed or calmer else "does not hold here"
    return Verdict(
        "holds" if tamed and after == 0 and free else verdict,
        f"At four times the rate the largest logit is {held:.1f} instead of {plain:.1f} and the loss jumps {after:.1f} "
        f"instead of {before:.1f} times a run ({hot} bits per byte); at the usual rate the difference is {quality}.",
    )
