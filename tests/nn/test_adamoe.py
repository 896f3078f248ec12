"""What the catalogue says of AdaMoE.

T tokens, D width, E true experts, m null experts.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import routing as r
from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select
from mixtura.hf import convert, mixtures
from mixtura.nn import ExpertGroup, Experts, FeedForward, Mixture
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.balance.null_balance import null_balance_loss
from mixtura.nn.experts.forms import ZeroExperts
from mixtura.nn.routers.adamoe import AdaMoERouter, with_null_experts
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

D, E, m = 8, 4, 3


def layer(k=3, nulls=m):
    torch.manual_seed(0)
    made = Mixture(AdaMoERouter(D, E, nulls, k), ExpertGroup([Experts(E, D, 6), ZeroExperts(nulls, D)]))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_without_null_experts_it_is_top_k_to_the_bit(generator):
    ours, plain = AdaMoERouter(D, E, 0, 2), TopKRouter(D, E, 2)
    plain.gate = ours.gate
    hidden_TD = torch.randn(20, D, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(ours(hidden_TD), plain(hidden_TD), strict=True))


def test_weights_are_divided_among_the_true_experts(generator):
    routing = layer().router(torch.randn(40, D, generator=generator))
    for t in range(40):
        probability_E = routing.logits_TE[t].softmax(-1)
        chosen = probability_E.topk(3).indices.tolist()
        total = sum(probability_E[e] for e in chosen if e < E)
        for e, weight in zip(routing.indices_TK[t].tolist(), routing.weights_TK[t], strict=True):
            assert e in chosen
            torch.testing.assert_close(weight, probability_E[e] / total if e < E else torch.tensor(0.0))


def test_a_token_whose_choices_are_all_null_gets_exactly_0(generator):
    made, hidden_TD = layer(), torch.randn(400, D, generator=generator)
    out_TD, routing = made(hidden_TD), made.router(hidden_TD)
    null_T = (routing.indices_TK >= E).all(1)
    assert null_T.any()
    assert torch.equal(out_TD.any(1), ~null_T)
    out_TD.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_null_experts_can_change_places(generator):
    """Neither the output nor the loss changes."""
    made, other = layer(), layer()
    order = torch.tensor([0, 1, 2, 3, 6, 4, 5])
    other.router.gate.weight.data = made.router.gate.weight[order].detach()
    hidden_TD = torch.randn(40, D, generator=generator)
    torch.testing.assert_close(other(hidden_TD), made(hidden_TD))
    losses = [null_balance_loss(layer.router(hidden_TD), null_experts=m) for layer in (made, other)]
    torch.testing.assert_close(*losses)


def test_true_and_null_choices_are_k_together(generator):
    routing = layer(k=3).router(torch.randn(200, D, generator=generator))
    per_token_E = r.counts(routing) / 200
    assert per_token_E[:E].sum() == pytest.approx(3 - per_token_E[E:].sum())
    assert set((routing.indices_TK < E).sum(1).tolist()) == {0, 1, 2, 3}


def test_at_balance_a_token_has_k_e_by_e_plus_m_true_experts():
    logits_TE = torch.stack([torch.linspace(1, -1, 16).roll(t) for t in range(160)])
    routing = select(logits_TE, SelectionSpec(k=3, renormalize=1, null_experts=8))
    assert (routing.indices_TK < 8).sum().item() / 160 == 3 * 8 / 16


def test_null_rows_of_the_gate_are_trained_by_the_balance_alone(generator):
    """In double precision nothing of the output's gradient is left there."""
    made, hidden_TD = layer().double(), torch.randn(40, D, generator=generator).double()
    made(hidden_TD).square().sum().backward()
    gradient = made.router.gate.weight.grad
    assert gradient[E:].abs().max() < 1e-12 * gradient[:E].abs().max()
    made.router.gate.weight.grad = None
    null_balance_loss(made.router(hidden_TD), null_experts=m).backward()
    assert made.router.gate.weight.grad[E:].abs().max() > 1e-3 * made.router.gate.weight.grad[:E].abs().max()


def test_the_loss_by_loops(generator):
    logits_TE = torch.randn(30, E + m, generator=generator)
    routing = select(logits_TE, SelectionSpec(k=3, null_experts=m))
    counts = r.counts(routing).tolist()
    f = [n / 90 for n in counts[:E]] + [sum(counts[E:]) / m / 90] * m
    P = logits_TE.softmax(-1).mean(0).tolist()
    expected = (E + m) * sum(f_e * P_e for f_e, P_e in zip(f, P, strict=True))
    assert null_balance_loss(routing, null_experts=m).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_asks_null_experts_for_their_share_together():
    """One null expert with the work of both costs no more than two that share it; alone it would."""
    logits_TE = torch.zeros(4, 4)
    apart = Routing(logits_TE, torch.ones(4, 1), torch.tensor([[0], [1], [2], [3]]))
    together = apart._replace(indices_TK=torch.tensor([[0], [1], [2], [2]]))
    steep_TE = torch.tensor([[0.0, 0.0, 1.0, -1.0]]).expand(4, 4)
    for loss, same in ((null_balance_loss, True), (lambda routing, **_: load_balancing_loss(routing), False)):
        values = [loss(routing._replace(logits_TE=steep_TE), null_experts=2) for routing in (apart, together)]
        assert torch.equal(*values) == same


def test_the_loss_takes_the_load_of_a_statistic(generator):
    routing = select(torch.randn(30, E + m, generator=generator), SelectionSpec(k=3))
    load_E = torch.full((E + m,), 1 / (E + m))
    load_E[-m:] = torch.tensor([3.0, 0.0, 0.0]) / (E + m)
    before_E = load_E.clone()
    assert null_balance_loss(routing, load_E=load_E, null_experts=m).item() == pytest.approx(1)
    assert torch.equal(load_E, before_E)


def upcycled():
    """A mixture as it comes from upcycling, with a shared expert."""
    torch.manual_seed(0)
    return Mixture(TopKRouter(32, E, 2), Experts(E, 32, 6), FeedForward(32, 4), layer="1")


def test_null_experts_beside_those_of_a_mixture_change_nothing_while_they_are_not_chosen(generator):
    old = upcycled()
    new = with_null_experts(old, m, 2)
    with torch.no_grad():
        new.router.gate.weight[E:] = 0
    hidden_TD = torch.randn(20, 32, generator=generator)
    chosen_T = (new.router(hidden_TD).indices_TK < E).all(1)
    assert chosen_T.any()
    torch.testing.assert_close(new(hidden_TD)[chosen_T], old(hidden_TD)[chosen_T])


def test_null_experts_beside_those_of_a_mixture_are_drawn_and_share_its_weights():
    old = upcycled().bfloat16().eval()
    new, again, other = (with_null_experts(old, m, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(new.router.gate.weight[:E], old.router.gate.weight)
    assert torch.equal(new.router.gate.weight, again.router.gate.weight)
    assert not torch.equal(new.router.gate.weight, other.router.gate.weight)
    assert new.router.gate.weight.dtype == torch.bfloat16
    assert new.experts.forms[0] is old.experts
    assert new.shared is old.shared
    assert new.layer == "1"
    assert not new.training


def test_null_experts_in_a_model_that_has_mixtures(tmp_path):
    """Saved with its configuration, and loaded."""
    model, x = convert(pico("llama"), {1: upcycled()}), tokens()
    model = convert(model, {1: with_null_experts(mixtures(model)["1"], m, 4)})
    assert model.config.mixtura["layers"]["1"]["router"] == {
        "method": "adamoe",
        "dim": 32,
        "num_experts": E,
        "null_experts": m,
        "k": 4,
    }
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits)


def test_refuses():
    with pytest.raises(OptionError, match="null_experts at least 0, got 4 and -1"):
        AdaMoERouter(D, 4, -1)
    with pytest.raises(OptionError, match="k must be at most the number of experts 7, got 8"):
        AdaMoERouter(D, 4, 3, 8)
    routing = select(torch.zeros(2, 4), SelectionSpec(k=1))
    with pytest.raises(OptionError, match=r"null_experts must lie in 1 .. 3, got 4"):
        null_balance_loss(routing, null_experts=4)
    with pytest.raises(OptionError, match="null_experts must be at least 1, got 0"):
        with_null_experts(upcycled(), 0, 2)
    for options in ({"renormalize": None}, {"scale": 2.0}, {"score": "sigmoid"}, {"noise": "learned"}, {"bias": True}):
        mixture = Mixture(TopKRouter(D, E, 2, **options), Experts(E, D, 6))
        with pytest.raises(NotExpressibleError, match="null experts are added to a"):
            with_null_experts(mixture, 1, 2)
