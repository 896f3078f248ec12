"""Training and measuring on R-LM-S, the same for every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from mixtura.core.routing import Routing, counts, violation
from mixtura.evidence.rigs.language import LENGTH, LanguageModel, decided
from mixtura.evidence.rigs.text import DOMAINS, draw, held_out_sequences, read
from mixtura.hf.balance import Balancer
from mixtura.nn import ExpertGroup, Mixture
from mixtura.nn.state import Record, RouterState, Tape

BATCH, STEPS, WARM_UP, HELD_OUT = 16, 1200, 100, 1024  # sequences a step, steps, steps, sequences


class Run(NamedTuple):
    """A model that was trained.

    Attributes:
        model: in evaluation mode.
        losses: of each step, nats a byte, without balance terms.
        slots: filled slots a token, mean over the layers, of each step.
        domains: of the text.
    """

    model: LanguageModel
    losses: list[float]
    slots: list[float]
    domains: tuple[str, ...]


def fit(
    *,
    seed: int,
    layer: Mapping[str, Any],
    lr: float,
    steps: int = STEPS,
    balance: Mapping[str, Any] | None = None,
    statistic: str = "micro-batch-load",
    calls: int = 1,
    bigrams: bool = False,
    domains: tuple[str, ...] = DOMAINS,
    model: LanguageModel | None = None,
    before: int = 0,
    total: int | None = None,
) -> Run:
    """Train a model; runs of one seed see the same sequences.

    Args:
        seed: of weights and data.
        layer: see ``language``.
        lr: highest rate; it rises over 100 steps and falls to 0 along a cosine.
        steps: of 16 sequences.
        balance: terms, see ``Balancer``.
        statistic: what load a balance term sees.
        calls: parts of the batch whose balance terms are taken apart, as if each were a call of its own.
        bigrams: see ``LanguageModel``.
        domains: of the text.
        model: to go on with, instead of a new one.
        before: steps that were made already: their data are passed over, and the rate goes on from there.
        total: steps after which the rate is 0; None is ``before + steps``.
    """
    torch.manual_seed(seed)
    model = LanguageModel(layer, bigrams=bigrams) if model is None else model
    data, generator = read(tuple(domains)).train, torch.Generator().manual_seed(1000 + seed)
    for _ in range(before):
        draw(data, BATCH, LENGTH, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    balancer, losses, slots = Balancer(model.train(), balance or {}, statistic), [], []
    for step in range(before, before + steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, total or before + steps)
        batch_BQ = draw(data, BATCH, LENGTH, generator)
        balancer.begin_step(BATCH * LENGTH)
        logits_BQV, state = model(batch_BQ[:, :-1])
        loss = F.cross_entropy(logits_BQV.flatten(0, 1), batch_BQ[:, 1:].flatten())
        torch.autograd.backward(loss + balancer.loss(split(state, calls))[0])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balancer.end_step()
        losses.append(loss.item())
        slots.append(filled(decided(state)))
    return Run(model.eval(), losses, slots, tuple(domains))


def schedule(step: int, steps: int) -> float:
    """Factor of the rate: up in a straight line, then down along a cosine to 0."""
    return min(1.0, (step + 1) / min(WARM_UP, steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def split(state: RouterState, calls: int) -> list[RouterState]:
    """The same decisions as if each of ``calls`` equal parts of the rows had been a call of its own."""
    if calls == 1:
        return [state]
    parts = []
    for number in range(calls):
        records = [Record(layer, _part(routing, number, calls)) for layer, routing in state.tape.records]
        parts.append(RouterState(rows=state.rows // calls, tape=Tape(records), differentiable=state.differentiable))
    return parts


def _part(routing: Routing, number: int, calls: int) -> Routing:
    return Routing(*(whole.chunk(calls)[number] for whole in routing))


def filled(routings: list[Routing]) -> float:
    """Filled slots a token, mean over the layers; 0 without mixtures."""
    shares = [float((r.indices_TK < r.num_experts).sum()) / len(r.indices_TK) for r in routings]
    return sum(shares) / len(shares) if shares else 0.0


class Held(NamedTuple):
    """Held-out text as a model sees it.

    Attributes:
        nats_BQ: loss of every byte.
        routings: of all layers, over all tokens.
        domain_B: number of the domain of each sequence.
    """

    nats_BQ: torch.Tensor
    routings: list[Routing]
    domain_B: torch.Tensor


@torch.no_grad()
def hold_out(run: Run, rows: int = HELD_OUT) -> Held:
    """Run the model on the held-out sequences, the same for all arms and seeds."""
    torch.manual_seed(0)  # of routers that draw
    sequences = held_out_sequences(read(run.domains), rows, LENGTH)
    nats, tapes = [], []
    for batch_BQ in torch.split(sequences, 64):
        logits_BQV, state = run.model(batch_BQ[:, :-1])
        nats.append(F.cross_entropy(logits_BQV.transpose(1, 2), batch_BQ[:, 1:], reduction="none"))
        tapes.append(decided(state))
    routings = [Routing(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*tapes, strict=True)]
    return Held(torch.cat(nats), routings, torch.arange(rows) % len(run.domains))


def figures(run: Run, held: Held) -> dict[str, float]:
    """What every arm reports: quality, balance and cost."""
    loads = [counts(routing).float() / counts(routing).sum() for routing in held.routings]
    mixtures = [part for part in run.model.modules() if isinstance(part, Mixture)]
    calls_E = [counts(routing).float() / len(routing.indices_TK) for routing in held.routings]
    return {
        "bits per byte": float(held.nats_BQ.mean()) / math.log(2),
        "MaxVio": max((violation(load) for load in loads), default=0.0),
        "slots a token": filled(held.routings),
        "total parameters": (total := sum(p.numel() for p in run.model.parameters())),
        "memory bytes": 16 * total,  # weights, gradients, and the optimizer's two moments
        **_active(run.model, mixtures, calls_E),
    }


def _active(model: LanguageModel, mixtures: list[Mixture], calls_E: list[torch.Tensor]) -> dict[str, float]:
    """Parameters and forward operations that one token uses, by the slots that it filled on held-out text."""
    stored = sum(p.numel() for mixture in mixtures for p in mixture.experts.parameters())
    used = sum(_used(mixture.experts, calls) for mixture, calls in zip(mixtures, calls_E, strict=True))
    active = sum(p.numel() for p in model.parameters()) - stored + used
    embedded = model.bytes.weight.numel() + model.places.weight.numel()
    attention = len(model.blocks) * 4 * LENGTH * model.bytes.weight.shape[1]
    return {"active parameters": active, "flops": 2 * (active - embedded) + attention}


def _used(experts: torch.nn.Module, calls_E: torch.Tensor) -> float:
    used, first = 0.0, 0
    for form in experts.forms if isinstance(experts, ExpertGroup) else [experts]:
        number = int(form.num_experts)  # type: ignore[arg-type]
        size = sum(p.numel() for p in form.parameters()) / number
        used += size * float(calls_E[first : first + number].sum())
        first += number
    return used


def train(*, rows: int = HELD_OUT, **config: Any) -> dict[str, float]:
    """``fit`` and ``figures`` on so many held-out sequences."""
    run = fit(**config)
    return figures(run, hold_out(run, rows))
