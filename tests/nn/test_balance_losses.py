"""What the catalogue says of the load-balancing loss and of the router z-loss.

T tokens, E experts, K slots a token.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core.errors import OptionError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.balance.router_z_loss import router_z_loss


def shifted(E, T):
    """Logits whose rows are turns of one row: every expert is every rank equally often, if E divides T."""
    row_E = torch.linspace(1, -1, E, dtype=torch.float64)
    return torch.stack([row_E.roll(t) for t in range(T)])


@given(E=st.integers(2, 9), rounds=st.integers(1, 3), data=st.data())
def test_the_balance_loss_is_1_at_balance_for_every_k(E, rounds, data):
    logits_TE = shifted(E, E * rounds)
    for score in ("softmax", "sigmoid"):
        routing = select(logits_TE, SelectionSpec(k=data.draw(st.integers(1, E)), score=score))
        assert load_balancing_loss(routing, score=score).item() == pytest.approx(1, rel=1e-6)


def test_the_balance_loss_is_e_when_one_expert_takes_all():
    logits_TE = torch.tensor([[60.0, 0, 0, 0]] * 5)
    assert load_balancing_loss(select(logits_TE, SelectionSpec(k=1))).item() == pytest.approx(4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_is_that_of_transformers_over_k(k, generator):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = torch.randn(30, 6, generator=generator)
    theirs = load_balancing_loss_func((logits_TE,), 6, k)
    torch.testing.assert_close(load_balancing_loss(select(logits_TE, SelectionSpec(k=k))), theirs / k)


def test_empty_slots_do_not_count():
    """Two experts share the filled slots equally, whatever was dropped."""
    logits_TE = torch.zeros(4, 2)
    indices_TK = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 2]])
    routing = Routing(logits_TE, (indices_TK < 2).float(), indices_TK)
    assert load_balancing_loss(routing).item() == pytest.approx(1)


def test_sigmoid_scores_that_all_underflow_still_balance():
    logits_TE = torch.full((6, 3), -300.0).requires_grad_()
    loss = load_balancing_loss(select(logits_TE, SelectionSpec(k=1, score="sigmoid")), score="sigmoid")
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad.any()


def test_an_unknown_score_is_refused():
    with pytest.raises(OptionError, match="score must be 'softmax' or 'sigmoid', got 'relu'"):
        load_balancing_loss(select(torch.zeros(2, 2), SelectionSpec(k=1)), score="relu")


def test_a_step_against_the_gradient_evens_the_load(generator):
    logits_TE = (torch.randn(200, 5, generator=generator) + torch.linspace(1, -1, 5)).requires_grad_()
    before = load_balancing_loss(select(logits_TE, SelectionSpec(k=2)))
    before.backward()
    with torch.no_grad():
        after = load_balancing_loss(select(logits_TE - 100 * logits_TE.grad, SelectionSpec(k=2)))
    assert after < before


def test_a_constant_changes_the_z_loss_and_not_the_routing(generator):
    logits_TE = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    spec = SelectionSpec(k=2, renormalize=1)
    one, other = select(logits_TE, spec), select(logits_TE + 3, spec)
    assert torch.equal(one.indices_TK, other.indices_TK)
    torch.testing.assert_close(one.weights_TK, other.weights_TK)
    z_T = logits_TE.exp().sum(-1).log()
    torch.testing.assert_close(router_z_loss(one), (z_T**2).mean())
    torch.testing.assert_close(router_z_loss(other), ((z_T + 3) ** 2).mean())


def test_the_z_loss_is_0_at_minus_log_e():
    logits_TE = torch.full((3, 4), -math.log(4), dtype=torch.float64)
    assert router_z_loss(select(logits_TE, SelectionSpec(k=1))).item() == pytest.approx(0, abs=1e-30)


def test_the_gradient_of_the_z_loss(generator):
    logits_TE = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    router_z_loss(select(logits_TE, SelectionSpec(k=1))).backward()
    z_T1 = logits_TE.detach().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(logits_TE.grad, 2 * z_T1 * logits_TE.detach().softmax(-1) / 7)
