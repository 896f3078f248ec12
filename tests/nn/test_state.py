"""``RouterState`` and its tape, also where activations are computed twice.

T tokens, D width.
"""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixtura.nn import Experts, Mixture, RouterState, current_state
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.nn.state import checkpoint_context, set_state, use_state

T, D = 10, 8


def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleList(Mixture(TopKRouter(D, 4, 2), Experts(4, D, 6), layer=str(i)) for i in range(2))


def forward(mixtures, hidden_TD, state, checkpointed):
    with use_state(state):
        for mixture in mixtures:
            if checkpointed:
                hidden_TD = hidden_TD + checkpoint(
                    mixture, hidden_TD, use_reentrant=False, context_fn=checkpoint_context
                )
            else:
                hidden_TD = hidden_TD + mixture(hidden_TD)
    return hidden_TD


def two_forwards_one_backward(checkpointed, generator):
    """Gradients of two forwards with different padding, and what their tapes hold afterwards."""
    mixtures, gradients = layers(), {}
    states = [RouterState(torch.arange(T) < 6), RouterState(torch.arange(T) % 2 == 0)]
    outs = [forward(mixtures, torch.randn(T, D, generator=generator), state, checkpointed) for state in states]
    (outs[0].square().sum() + 3 * outs[1].square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in mixtures.named_parameters()}
    return gradients, states


def test_recomputation_sees_the_state_of_its_own_forward():
    expected, _ = two_forwards_one_backward(False, torch.Generator().manual_seed(1))
    gradients, states = two_forwards_one_backward(True, torch.Generator().manual_seed(1))
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    for state in states:
        assert [record.layer for record in state.tape.records] == ["0", "1"]
        assert not state.recomputing
        for record in state.tape.records:
            assert (record.routing.indices_TK[~state.mask_T] == 4).all()
    assert current_state() is None


def test_a_loss_of_the_tape_reaches_the_gates_through_checkpoints(generator):
    mixtures, state = layers(), RouterState()
    forward(mixtures, torch.randn(T, D, generator=generator).requires_grad_(), state, checkpointed=True)
    sum(record.routing.logits_TE.square().sum() for record in state.tape.records).backward()
    assert mixtures[0].router.gate.weight.grad.any()


def test_two_backwards_through_one_checkpoint(generator):
    mixtures, state = layers(), RouterState(torch.arange(T) < 6)
    out_TD = forward(mixtures, torch.randn(T, D, generator=generator), state, checkpointed=True)
    out_TD.sum().backward(retain_graph=True)
    once = mixtures[0].router.gate.weight.grad.clone()
    out_TD.sum().backward()
    torch.testing.assert_close(mixtures[0].router.gate.weight.grad, 2 * once)
    assert len(state.tape.records) == 2


def test_checkpoints_without_a_state(generator):
    mixtures = layers()
    out_TD = forward(mixtures, torch.randn(T, D, generator=generator), None, checkpointed=True)
    with use_state(RouterState(torch.zeros(T, dtype=torch.bool))) as other:
        out_TD.sum().backward()
    assert other.tape.records == []
    assert mixtures[0].router.gate.weight.grad.any()


def test_an_error_in_recomputation_leaves_no_state_behind():
    state = RouterState()
    with use_state(state):
        _, again = checkpoint_context()
    with pytest.raises(RuntimeError), again:
        raise RuntimeError
    assert not state.recomputing
    assert current_state() is None


def test_states_nest_and_belong_to_their_thread():
    outer, inner, seen = RouterState(), RouterState(), []
    with use_state(outer):
        with use_state(inner):
            assert current_state() is inner
        assert current_state() is outer
        thread = threading.Thread(target=lambda: seen.append(current_state()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert current_state() is None


def test_set_state_holds_until_the_next_call():
    state = RouterState()
    set_state(state)
    assert current_state() is state
    set_state(None)
    assert current_state() is None
