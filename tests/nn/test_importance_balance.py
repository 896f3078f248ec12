"""What the catalogue says of the importance loss.

T tokens, E experts.
"""

import pytest
import torch

from mixtura.core import routing as r
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.balance.importance_balance import importance_balance_loss


def test_is_the_squared_coefficient_of_variation(generator):
    routing = select(torch.randn(30, 5, generator=generator), SelectionSpec(k=2, renormalize=1))
    importance_E = r.dense(routing).sum(0)
    expected = importance_E.var(correction=0) / importance_E.mean() ** 2
    torch.testing.assert_close(importance_balance_loss(routing), expected)


def test_is_0_for_equal_weight_and_e_minus_1_if_one_expert_has_all():
    weights_TK = torch.tensor([[0.3, 0.7], [0.7, 0.3]])
    even = Routing(torch.zeros(2, 2), weights_TK, torch.tensor([[0, 1], [0, 1]]))
    assert importance_balance_loss(even).item() == pytest.approx(0, abs=1e-12)
    for scale in (1.0, 1e-30):
        one = Routing(torch.zeros(3, 4), torch.full((3, 1), scale), torch.tensor([[2], [2], [2]]))
        assert importance_balance_loss(one).item() == pytest.approx(3)


def test_sees_weight_and_not_tokens():
    """Expert 0 has many tokens of small weight, and as much weight as expert 1 has."""
    weights_T1, indices_T1 = torch.tensor([[0.25], [0.25], [0.25], [0.25], [1.0]]), torch.tensor([[0]] * 4 + [[1]])
    assert importance_balance_loss(Routing(torch.zeros(5, 2), weights_T1, indices_T1)).item() == 0


def test_a_step_against_the_gradient_evens_the_importance(generator):
    logits_TE = (torch.randn(200, 5, generator=generator) + torch.linspace(1, -1, 5)).requires_grad_()
    spec = SelectionSpec(k=2, order="topk-score")
    before = importance_balance_loss(select(logits_TE, spec))
    before.backward()
    with torch.no_grad():
        assert importance_balance_loss(select(logits_TE - 100 * logits_TE.grad, spec)) < 0.8 * before
