"""Balance over the whole batch instead of each sequence: does it let experts specialize by domain?

A sequence is of one domain, and the balance terms of each sequence are taken apart, as if each were a micro-batch. The
load that they see is that of the sequence, or that of all 16 so far. Specialization is the information that an expert
tells about the domain, in nats: the mean over the layers of the mutual information on held-out text.
"""

import torch

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs.language_arms import ACTIVE, FIGURE, RANDOM, SETTING, mixture, run
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out
from mixtura.traces.metrics import mutual_information

TOP2 = mixture("topk-softmax", k=2)
FREE, MICRO, GLOBAL = "no balance", "balance in each sequence", "balance in the whole batch"
INFORMATION = "information about the domain, nats"


def train_and_ask(*, rows=HELD_OUT, **config):
    """Also what an expert tells about the domain."""
    run = fit(**config)
    held = hold_out(run, rows)
    told = [_information(routing, held.domain_B) for routing in held.routings]
    return {**figures(run, held), INFORMATION: sum(told) / max(len(told), 1)}


def _information(routing, domain_B):
    domain_T = domain_B.repeat_interleave(len(routing.indices_TK) // len(domain_B))
    experts = routing.num_experts
    joint = torch.zeros(int(domain_B.max()) + 1, experts + 1).long()
    K = routing.indices_TK.shape[1]
    joint.index_put_((domain_T.repeat_interleave(K), routing.indices_TK.flatten()), torch.tensor(1), accumulate=True)
    return float(mutual_information(joint[:, :experts].numpy()))


@evidence(
    "global-batch-lbl",
    claim="Balance over the whole batch is better by 0.01 bits per byte than balance within each sequence, its experts "
    "tell at least three times as much about the domain, and the load is as even.",
    source="Qiu et al., arXiv:2501.11873",
    figure="bits per byte, lower is better",
    setting=SETTING + "; coefficient 0.02, 16 micro-batches of one sequence a step",
)
def measure(lab: Lab) -> Verdict:
    """Three scopes of the balance loss: none, a sequence, the batch."""
    run(lab, FREE, TOP2, train_and_ask)
    terms = {"balance": {"load-balancing": 0.02}, "calls": 16}
    run(lab, MICRO, TOP2, train_and_ask, statistic="micro-batch-load", **terms)
    run(lab, GLOBAL, TOP2, train_and_ask, statistic="global-batch-lbl", **terms)
    run(lab, ACTIVE, {"dense": 128})
    run(lab, RANDOM, mixture("random", k=2))
    gain = lab.difference(FIGURE, GLOBAL, MICRO)
    micro, whole, free = (lab.mean(INFORMATION, name) for name in (MICRO, GLOBAL, FREE))
    even = {name: lab.mean("MaxVio", name) for name in (MICRO, GLOBAL)}
    found = (gain.mean <= -0.01 and gain.high < 0) + (whole >= 3 * micro) + (even[GLOBAL] <= even[MICRO] + 0.2)
    return Verdict(
        {3: "holds", 0: "does not hold here"}.get(found, "partly"),
        f"The batch minus the sequence is {gain} bits per byte; an expert tells {whole:.3f} nats about the domain "
        f"instead of {micro:.3f} (without balance {free:.3f}); MaxVio is {even[GLOBAL]:.2f} and {even[MICRO]:.2f}.",
    )
