"""What the catalogue says of dynamic top-p.

T tokens, D width, E experts.
"""

import math

import pytest
import torch

from mixtura.core import routing as r
from mixtura.core.errors import OptionError
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn import Experts, Mixture
from mixtura.nn.balance.dynamic_entropy import dynamic_entropy_loss
from mixtura.nn.routers.dynamic_top_p import DynamicTopPRouter
from mixtura.nn.routers.topk_softmax import TopKRouter

D, E = 8, 6


def router(num_experts=E, **options):
    torch.manual_seed(0)
    made = DynamicTopPRouter(D, num_experts, **options)
    torch.nn.init.normal_(made.gate.weight, std=0.5)
    return made


def number(routing):
    """Experts of each token (T,)."""
    return (routing.indices_TK < routing.num_experts).sum(1)


def by_loops(probability_E, p):
    """Experts by falling probability until their sum exceeds p."""
    kept, total = {}, 0.0
    for e in sorted(range(len(probability_E)), key=lambda e: (-probability_E[e], e)):
        kept[e] = probability_E[e]
        total += probability_E[e]
        if total > p:
            break
    return [kept.get(e, 0.0) for e in range(len(probability_E))]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.4, 0.77, 0.95])
def test_agrees_with_the_loops(p, generator):
    routing = router(p=p)(torch.randn(60, D, generator=generator))
    expected_TE = [by_loops(row, p) for row in routing.logits_TE.softmax(-1).tolist()]
    torch.testing.assert_close(r.dense(routing), torch.tensor(expected_TE))


def test_p_0_is_top_1_with_the_largest_probability(generator):
    hidden_TD = torch.randn(60, D, generator=generator)
    made, plain = router(p=0), TopKRouter(D, E, 1, renormalize=None)
    plain.gate = made.gate
    assert torch.equal(r.dense(made(hidden_TD)), r.dense(plain(hidden_TD)))


def test_p_1_is_the_dense_mixture(generator):
    """To the bit, also where float32 sums exceed 1 before the last expert."""
    made, hidden_TD = router(p=1), 8 * torch.randn(1000, D, generator=generator)
    probability_TE = made.gate(hidden_TD).softmax(-1)
    assert (probability_TE.sort(-1, descending=True).values.cumsum(-1)[:, :-1] > 1).any()
    assert torch.equal(r.dense(made(hidden_TD)), probability_TE)


def test_more_p_is_never_fewer_experts_and_their_sum_exceeds_it(generator):
    logits_TE = torch.randn(200, E, generator=generator) * 2
    fewer_T = torch.zeros(200)
    for p in (0.0, 0.1, 0.3, 0.4, 0.5, 0.8, 0.9, 0.99):
        routing = select(logits_TE, SelectionSpec(k=E, p=p))
        assert (number(routing) >= fewer_T).all()
        assert (routing.weights_TK.sum(1) > p).all()
        fewer_T = number(routing)
    assert fewer_T.float().mean() > 4


@pytest.mark.parametrize(("num_experts", "p"), [(8, 0.75), (8, 0.4), (16, 0.5), (64, 0.4), (64, 0.999)])
def test_of_equal_experts_one_more_than_p_asks_for(num_experts, p):
    """floor(p E) + 1; where E is a power of 2 the sums are exact."""
    routing = select(torch.zeros(3, num_experts), SelectionSpec(k=num_experts, p=p))
    assert number(routing).tolist() == [min(math.floor(p * num_experts) + 1, num_experts)] * 3


def test_max_k_bounds_the_slots(generator):
    hidden_TD = torch.randn(60, D, generator=generator)
    whole, bounded = router(p=0.9)(hidden_TD), router(p=0.9, max_k=2)(hidden_TD)
    assert bounded.indices_TK.shape == (60, 2)
    assert torch.equal(bounded.indices_TK, whole.indices_TK[:, :2])
    assert (number(whole) > 2).any()


def test_weights_are_the_probabilities_in_the_layer(generator):
    layer, hidden_TD = Mixture(router(p=0.5), Experts(E, D, 5)), torch.randn(20, D, generator=generator)
    gates_TE = r.dense(layer.router(hidden_TD))
    ones = torch.ones(20, 1)
    each = [layer.experts(hidden_TD, torch.full((20, 1), e), ones) for e in range(E)]
    expected_TD = sum(gates_TE[:, e, None] * each[e] for e in range(E))
    torch.testing.assert_close(layer(hidden_TD), expected_TD, rtol=1e-4, atol=1e-6)


def test_a_router_that_follows_the_entropy_loss_uses_fewer_experts(generator):
    made, hidden_TD = router(p=0.6), torch.randn(100, D, generator=generator)
    before = number(made(hidden_TD)).float().mean()
    optimizer = torch.optim.SGD(made.parameters(), lr=2.0)
    for _ in range(30):
        optimizer.zero_grad()
        dynamic_entropy_loss(made(hidden_TD)).backward()
        optimizer.step()
    assert number(made(hidden_TD)).float().mean() < before - 0.5


def test_the_entropy_is_that_of_the_core(generator):
    logits_TE = torch.randn(7, E, generator=generator)
    routing = select(logits_TE, SelectionSpec(k=E, p=0.4))
    expected = sum(r.entropy(row_E) for row_E in logits_TE.softmax(-1)) / 7
    assert dynamic_entropy_loss(routing).item() == pytest.approx(expected, rel=1e-5)
    assert dynamic_entropy_loss(select(torch.zeros(3, E), SelectionSpec(k=1))).item() == pytest.approx(math.log(E))


def test_refuses():
    with pytest.raises(OptionError, match="p must be None, or at least 0"):
        router(p=-0.5)
    with pytest.raises(OptionError, match="k must be at most the number of experts 6, got 7"):
        router(max_k=7)
