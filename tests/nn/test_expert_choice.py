"""What the catalogue says of expert choice.

T tokens in B sequences of Q, D width, E experts.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core import routing as r
from mixtura.core.errors import OptionError, ShapeError
from mixtura.nn import Experts, Mixture, RouterState
from mixtura.nn.causality import sees_future
from mixtura.nn.routers.expert_choice import ExpertChoiceRouter
from mixtura.nn.state import use_state

D, E = 8, 4


def router(num_experts=E, **options):
    torch.manual_seed(0)
    made = ExpertChoiceRouter(D, num_experts, **options)
    torch.nn.init.normal_(made.gate.weight, std=0.5)
    return made


def route(made, hidden_TD, rows=1, mask_T=None):
    with use_state(RouterState(mask_T, rows=rows)):
        return r.check(made(hidden_TD))


def by_loops(scores_TE, groups, capacity_factor):
    """Who takes whom (T, E): expert by expert, the best tokens of each group, the first of equal ones."""
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    E = scores_TE.shape[1]
    for group in groups:
        C = min(max(int(capacity_factor * len(group) / E + 0.5), 1), len(group))
        for e in range(E):
            for t in sorted(group, key=lambda t: (-scores_TE[t, e].item(), t))[:C]:
                taken_TE[t, e] = True
    return taken_TE


@given(rows=st.integers(1, 3), Q=st.integers(0, 7), factor=st.sampled_from([0.1, 1.0, 1.25, 2.0, 9.0]), data=st.data())
def test_agrees_with_the_loops(rows, Q, factor, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # the larger scale makes probabilities that are 0, as those of padding
    hidden_TD = torch.randn(rows * Q, D, generator=generator).round() * data.draw(st.sampled_from([1, 300]))
    real_T = torch.rand(rows * Q, generator=generator) < 0.7
    made = router(capacity_factor=factor)
    groups = [[t for t in range(row * Q, row * Q + Q) if real_T[t]] for row in range(rows)]
    routing = route(made, hidden_TD, rows, real_T)
    scores_TE = routing.logits_TE.softmax(-1)
    taken_TE = by_loops(scores_TE, groups, factor)
    assert torch.equal(routing.indices_TK < E, taken_TE)
    assert torch.equal(r.dense(routing), scores_TE * taken_TE)


def test_every_expert_takes_as_many_tokens(generator):
    routing = route(router(capacity_factor=2), torch.randn(48, D, generator=generator), rows=3)
    taken_BE = (routing.indices_TK.view(3, 16, E) < E).sum(1)
    assert (taken_BE == 2 * 16 // E).all()
    assert r.violation(r.load(routing)) == 0
    per_token_T = (routing.indices_TK < E).sum(1)
    assert per_token_T.min() < per_token_T.max()


def test_taking_all_is_the_dense_softmax_mixture(generator):
    """To the bit: the matrix of weights is that of the softmax."""
    made, hidden_TD = router(capacity_factor=E), torch.randn(12, D, generator=generator)
    assert torch.equal(r.dense(made(hidden_TD)), made.gate(hidden_TD).softmax(-1))


def test_what_comes_later_changes_what_is_taken(generator):
    made, hidden_TD = router(), torch.randn(12, D, generator=generator)
    before = route(made, hidden_TD)
    changed_TD = hidden_TD.clone()
    changed_TD[-1] = 30 * made.gate.weight[0]
    after = route(made, changed_TD)
    assert not torch.equal(after.indices_TK[:-1], before.indices_TK[:-1])
    assert sees_future(made)


def test_alone_in_its_group_a_token_is_taken_by_all(generator):
    """As in generation; then nothing is left of the choice, and nothing leaks."""
    made, hidden_TD = router(), torch.randn(6, D, generator=generator)
    alone = route(made, hidden_TD, rows=6)
    assert torch.equal(r.dense(alone), made.gate(hidden_TD).softmax(-1))
    assert not sees_future(router(capacity_factor=E))


def test_a_sequence_does_not_see_its_batch_mates_and_a_batch_does(generator):
    hidden_TD = torch.randn(20, D, generator=generator)
    for group, same in (("sequence", True), ("batch", False)):
        made = router(group=group)
        together = r.dense(route(made, hidden_TD, rows=2))
        apart = torch.cat([r.dense(route(made, half)) for half in hidden_TD.split(10)])
        assert torch.allclose(together, apart) == same


def test_equal_tokens_are_taken_in_their_order():
    routing = route(router(capacity_factor=1), torch.ones(8, D))
    assert routing.indices_TK[:2].tolist() == [list(range(E))] * 2
    assert (routing.indices_TK[2:] == E).all()


def test_a_token_that_nobody_takes_gets_nothing(generator):
    layer = Mixture(router(capacity_factor=0.5), Experts(E, D, 6))
    hidden_TD = torch.randn(16, D, generator=generator)
    nobody_T = (layer.router(hidden_TD).indices_TK == E).all(1)
    assert nobody_T.any()
    assert torch.equal(layer(hidden_TD).any(1), ~nobody_T)


def test_refuses():
    with pytest.raises(OptionError, match="capacity_factor must be above 0, got 0"):
        router(capacity_factor=0)
    with pytest.raises(OptionError, match="group must be one of 'sequence', 'batch', got 'row'"):
        router(group="row")
    with pytest.raises(ShapeError, match="rows of the state must divide its 10 tokens, got 3"):
        route(router(), torch.zeros(10, D), rows=3)
