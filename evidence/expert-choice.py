"""Expert choice: perfect balance without a loss, and what it costs a language model.

On digits, where nothing has to be predicted from left to right, experts choose patches (2 experts a patch on average)
and are compared with top-2 of the patches' choice. On text the leak is made visible: a language model in which experts
choose among the bytes of a whole sequence is measured once so, as in training, and once with each byte predicted from
the bytes before it alone, as in generation.
"""

import math

import torch
from torch.nn import functional as F

from mixtura.evidence import Lab, Verdict, evidence
from mixtura.evidence.rigs import digits
from mixtura.evidence.rigs.language import LENGTH
from mixtura.evidence.rigs.language_arms import budget, mixture
from mixtura.evidence.rigs.language_training import HELD_OUT, figures, fit, hold_out
from mixtura.evidence.rigs.text import held_out_sequences, read

EXPERTS, TOKENS = "experts choose", "tokens choose, balance 0.01"
DENSE, WIDE, RANDOM = "dense, equal active size", "dense, equal total size", "random routing"
READER, TOP2 = "experts choose, on text", "top-2, on text"
SEEN, ALONE = "bits per byte from whole sequences", "bits per byte from the past alone"
CHECKED = 32  # sequences


def train_and_generate(*, rows=HELD_OUT, **config):
    """Also the loss on a few sequences as in training, and when a byte's model sees the bytes before it alone."""
    run = fit(**config)
    sequences = held_out_sequences(read(run.domains), min(rows, CHECKED), LENGTH)
    return {**figures(run, hold_out(run, rows)), **_two_ways(run.model, sequences)}


@torch.no_grad()
def _two_ways(model, sequences):
    logits_BQV, _ = model(sequences[:, :-1])
    seen = F.cross_entropy(logits_BQV.flatten(0, 1), sequences[:, 1:].flatten())
    nats = []
    for length in range(1, sequences.shape[1]):
        logits_BQV, _ = model(sequences[:, :length])
        nats.append(F.cross_entropy(logits_BQV[:, -1], sequences[:, length]))
    return {SEEN: float(seen) / math.log(2), ALONE: float(torch.stack(nats).mean()) / math.log(2)}


@evidence(
    "expert-choice",
    claim="Experts that choose are perfectly balanced without a loss and as accurate as tokens that choose (to one "
    "percent of error); in a causal language model they see the future, so the loss in training is not the loss in "
    "generation.",
    source="Zhou et al., arXiv:2202.09368",
    figure="test error, %, lower is better",
    setting="R-DIG: 1797 digits, vision transformer (D 64, 4 blocks, 16 patches, 8 experts of width 64), 40 epochs, "
    "rates chosen on images of their own; for the leak R-LM-S, rate 0.003, no balance",
)
def measure(lab: Lab) -> Verdict:
    """Two choices, dense and random on digits; the leak on text."""
    short = lab.pick({}, smoke={"epochs": 1})
    for name, layer, balance in (
        (EXPERTS, mixture("expert-choice", capacity_factor=2.0, group="batch"), None),
        (TOKENS, mixture("topk-softmax", k=2), {"load-balancing": 0.01}),
        (DENSE, {"dense": 128}, None),
        (WIDE, {"dense": 512}, None),
        (RANDOM, mixture("random", k=2), None),
    ):
        rates = {"lr": [1e-3, 2e-3]}
        lab.tuned_arm(name, digits.train, grid=rates, figure=digits.CHOOSING, layer=layer, balance=balance, **short)
    for name, layer in ((READER, mixture("expert-choice")), (TOP2, mixture("topk-softmax", k=2))):
        lab.arm(name, train_and_generate, layer=layer, lr=3e-3, **budget(lab))
    gap = lab.difference(digits.ERROR, EXPERTS, TOKENS)
    even, uneven = lab.mean("MaxVio", EXPERTS), lab.mean("MaxVio", TOKENS)
    seen, alone = lab.mean(SEEN, READER), lab.mean(ALONE, READER)
    honest = lab.mean(ALONE, TOP2) - lab.mean(SEEN, TOP2)
    found = (gap.high <= 1) + (even < 1e-6 < uneven) + (alone - seen > honest + 0.1)
    return Verdict(
        {3: "holds", 0: "does not hold here"}.get(found, "partly"),
        f"On digits experts' choice minus tokens' choice is {gap} % error, with MaxVio {even:.3f} and {uneven:.2f}; on "
        f"text it reads {seen:.2f} bits per byte when experts see whole sequences and {alone:.2f} from the past alone "
        f"({CHECKED} sequences; top-2 differs by {honest:+.3f}).",
    )
