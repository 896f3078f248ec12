"""R-LM-S made a mixture on the way: dense steps, a surgery on every feed-forward layer, and steps of the mixture.

All arms of a seed go on from the same dense model, with new optimizer state, along one schedule of the rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from mixtura.core import registry
from mixtura.evidence.rigs.language import LanguageModel
from mixtura.evidence.rigs.language_training import HELD_OUT, Run, figures, fit, hold_out
from mixtura.evidence.rigs.text import DOMAINS
from mixtura.nn import Experts, FeedForward, Mixture
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import view_expert

WIDTH, RATE = 128, 3e-3  # of the dense model
AT_ONCE, DIVERSITY = "bits per byte after conversion", "diversity of experts"
EARLY, LATE = "training loss, first tenth, nats", "training loss, last tenth, nats"


def convert(model: LanguageModel, surgery: str, options: Mapping[str, Any], seed: int) -> None:
    """Replace every dense layer by the mixture that a surgery makes of it."""
    for number, block in enumerate(model.blocks):
        dense = block.feed_forward
        assert isinstance(dense, FeedForward)
        assert dense.gate_proj is not None
        gate, up, down = (part.weight.detach() for part in (dense.gate_proj, dense.up_proj, dense.down_proj))
        given = FeedForwardWeights(gate, up, down, None, None, None, "silu")
        mixture = registry.get(surgery)(given, seed=1000 * seed + number, **options).mixture
        mixture.layer = str(number)
        block.feed_forward = mixture


def go_on(
    *,
    seed: int,
    lr: float,
    dense_steps: int,
    steps: int,
    surgery: str | None = None,
    options: Mapping[str, Any] | None = None,
    balance: Mapping[str, Any] | None = None,
    domains: tuple[str, ...] = DOMAINS,
    rows: int = HELD_OUT,
) -> dict[str, float]:
    """Train a dense model, convert it, train on; figures of the end, and of the way there.

    Args:
        seed: of everything.
        lr: highest rate of the schedule that the second part goes along; the first has 3e-3.
        dense_steps: before the conversion.
        steps: after it.
        surgery: key; None goes on with the dense model.
        options: of the surgery.
        balance: terms of the second part.
        domains: of the text.
        rows: held-out sequences.
    """
    whole = dense_steps + steps
    model = fit(seed=seed, layer={"dense": WIDTH}, lr=RATE, steps=dense_steps, total=whole, domains=domains).model
    if surgery is not None:
        convert(model, surgery, options or {}, seed)
    at_once = float(hold_out(Run(model, [], [], tuple(domains)), rows).nats_BQ.mean()) / math.log(2)
    run = fit(
        seed=seed, layer={}, lr=lr, steps=steps, before=dense_steps, model=model, balance=balance, domains=domains
    )
    tenth = max(1, steps // 10)
    return {
        **figures(run, hold_out(run, rows)),
        AT_ONCE: at_once,
        EARLY: statistics.fmean(run.losses[:tenth]),
        LATE: statistics.fmean(run.losses[-tenth:]),
        DIVERSITY: diversity(run.model),
    }


@torch.no_grad()
def diversity(model: LanguageModel) -> float:
    """1 minus the mean cosine between outputs of two experts for the same Gaussian token; 0 without mixtures."""
    found = [_diversity(part.experts) for part in model.modules() if isinstance(part, Mixture)]
    return statistics.fmean(found) if found else 0.0


def _diversity(experts: torch.nn.Module) -> float:
    assert isinstance(experts, Experts)
    tokens_TD = torch.randn(256, experts.dim, generator=torch.Generator().manual_seed(0))
    views = [view_expert(experts, e) for e in range(experts.num_experts)]
    outputs = torch.stack([FeedForwardWeights(*view, "silu")(tokens_TD) for view in views], 1)
    unit_TED = torch.nn.functional.normalize(outputs, dim=-1)
    cosines_TEE = unit_TED @ unit_TED.transpose(1, 2)
    E = experts.num_experts
    return 1 - float((cosines_TEE.sum((1, 2)) - E).mean()) / (E * (E - 1))
