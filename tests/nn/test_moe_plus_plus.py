"""What the catalogue says of MoE++: experts without computation, the gating residual and the balance among unlike ones.

T tokens, D width, E experts.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixtura.core import routing as r
from mixtura.core.errors import OptionError
from mixtura.core.selection import SelectionSpec, select
from mixtura.hf import convert, record
from mixtura.hf.count import count_parameters
from mixtura.nn import Experts, Mixture, Router, RouterState
from mixtura.nn.balance.heterogeneous_balance import heterogeneous_balance_loss
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.layers.moe_plus_plus import moe_plus_plus
from mixtura.nn.routers.gating_residual import GatingResidualRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.nn.state import checkpoint_context, use_state
from pico import pico, tokens

D, N, E = 8, 4, 8


def layer(number="0", **options):
    torch.manual_seed(int(number))
    made = moe_plus_plus(D, 6, N, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.layer = number
    return made


def choosing(made, *experts):
    """The layer, whose router gives these experts equal logits and all others less."""
    made.router.gate = torch.nn.Module()
    made.router.gate.forward = lambda hidden_TD: torch.zeros(len(hidden_TD), E).index_fill(
        1, torch.tensor(experts), 9.0
    )
    return made


CONSTANT, COPY, ZERO = (4, 5), 6, 7


def test_the_order_of_the_experts():
    assert [form.method_config["method"] for form in layer().experts.forms] == [
        "feed-forward",
        "constant",
        "copy",
        "zero",
    ]
    assert [form.num_experts for form in layer().experts.forms] == [N, 2, 1, 1]
    assert layer().router.num_experts == E


def test_copy_and_zero_return_the_token_to_the_bit(generator):
    hidden_TD = torch.randn(5, D, generator=generator)
    before_TD = hidden_TD.clone()
    out_TD = choosing(layer(), COPY, ZERO)(hidden_TD)
    assert torch.equal(out_TD, hidden_TD)
    assert torch.equal(hidden_TD, before_TD)


@pytest.mark.parametrize("e", [0, 3, 4, 6])
def test_beside_a_zero_expert_the_other_weighs_exactly_1(e, generator):
    made, hidden_TD = choosing(layer(), e, ZERO), torch.randn(5, D, generator=generator)
    routing = made.router(hidden_TD)
    assert routing.indices_TK.tolist() == [[e, ZERO]] * 5
    assert routing.weights_TK.tolist() == [[1.0, 0.0]] * 5
    alone_TD = made.experts(hidden_TD, torch.full((5, 1), e), torch.ones(5, 1))
    assert torch.equal(made(hidden_TD), alone_TD)


def test_two_zero_experts_return_nothing(generator):
    made = choosing(layer(copy=0, zero=2), 6, 7)
    assert not made(torch.randn(5, D, generator=generator)).any()


def test_without_other_experts_and_residual_it_is_top_2_of_the_same_gate(generator):
    made = layer(constant=0, copy=0, zero=0)
    torch.nn.init.zeros_(made.router.gate.residual.weight)
    plain = Mixture(Router(made.router.gate, SelectionSpec(k=2, renormalize=1), N), made.experts)
    hidden_TD = torch.randn(20, D, generator=generator)
    assert type(made.experts) is Experts
    assert torch.equal(made(hidden_TD), plain(hidden_TD))


def test_a_linear_gate_without_residual_is_topk_softmax(generator):
    made, plain = GatingResidualRouter(D, 7, gate="linear"), TopKRouter(D, 7, 2)
    with torch.no_grad():
        plain.gate.weight.copy_(made.gate.token.weight)
    hidden_TD = torch.randn(20, D, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(made(hidden_TD), plain(hidden_TD), strict=True))


def run(layers, hidden_TD, state, checkpointed=False):
    with use_state(state):
        for made in layers:
            call = (lambda x, made=made: made(x)) if not checkpointed else checkpointing(made)
            hidden_TD = hidden_TD + call(hidden_TD)
    return hidden_TD


def checkpointing(made):
    return lambda x: checkpoint(made, x, use_reentrant=False, context_fn=checkpoint_context)


def test_logits_add_up_over_depth(generator):
    """L_j = G_j(x) + L_(j-1) R_j^T, with the two-layer gate written out."""
    layers, state = [layer(str(i)) for i in range(3)], RouterState()
    hidden_TD, before_TE = torch.randn(10, D, generator=generator), torch.zeros(10, E)
    seen = []
    for made in layers:
        made.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(layers, hidden_TD, state)
    for made, x_TD, (_, routing) in zip(layers, seen, state.tape.records, strict=True):
        gate = made.router.gate
        token_TE = torch.tanh(x_TD @ gate.hidden.weight.T) @ gate.token.weight.T
        before_TE = token_TE + before_TE @ gate.residual.weight.T
        torch.testing.assert_close(routing.logits_TE, before_TE)


def test_the_first_mixture_and_one_outside_of_a_model_have_no_residual(generator):
    made, hidden_TD = layer(), torch.randn(10, D, generator=generator)
    gate = made.router.gate
    expected_TE = torch.tanh(hidden_TD @ gate.hidden.weight.T) @ gate.token.weight.T
    torch.testing.assert_close(made.router(hidden_TD).logits_TE, expected_TE)
    state = RouterState()
    run([made], hidden_TD, state)
    torch.testing.assert_close(state.tape.records[0].routing.logits_TE, expected_TE)


def gradients(checkpointed, generator):
    """Of the last layer's weights alone, for the first layer's gate; over two forwards before one backward."""
    layers, states = [layer(str(i)) for i in range(3)], [RouterState(), RouterState()]
    outs = [run(layers, torch.randn(10, D, generator=generator), state, checkpointed) for state in states]
    weights = [state.tape.records[-1].routing.weights_TK for state in states]
    sum(weights_TK[:, 0].square().sum() for weights_TK in weights).backward(retain_graph=True)
    residual = layers[0].router.gate.token.weight.grad.clone()
    sum(out_TD.square().sum() for out_TD in outs).backward()
    return residual, {f"{i}.{n}": p.grad for i, made in enumerate(layers) for n, p in made.named_parameters()}


def test_gradient_flows_through_the_residual_with_and_without_checkpointing():
    plain, all_of_them = gradients(False, torch.Generator().manual_seed(0))
    again, all_again = gradients(True, torch.Generator().manual_seed(0))
    assert plain.any()
    assert torch.equal(again, plain)
    for name, gradient in all_of_them.items():
        assert torch.equal(all_again[name], gradient), name
        assert gradient is not None, name
    assert not all_of_them["0.router.gate.residual.weight"].any()
    assert all_of_them["1.router.gate.residual.weight"].any()


def test_the_residual_alone_carries_the_gradient(generator):
    """Without it the second layer's choice says nothing to the first layer's gate but through the hidden states."""
    layers, state = [layer(str(i)) for i in range(2)], RouterState()
    hidden_TD = torch.randn(10, D, generator=generator)
    with use_state(state):
        layers[0](hidden_TD)
        layers[1](hidden_TD)
    state.tape.records[1].routing.weights_TK[:, 0].sum().backward()
    assert layers[0].router.gate.token.weight.grad.any()


def test_a_mixture_before_with_other_experts_is_refused(generator):
    other = Mixture(TopKRouter(D, 3), Experts(3, D, 6), layer="0")
    with pytest.raises(OptionError, match="both need as many experts: layer '1' has 8, the one before 3"):
        run([other, layer("1")], torch.randn(10, D, generator=generator), RouterState())


def test_a_mixture_before_without_logits_is_refused(generator):
    state = RouterState()
    state.tape.write("0", select(torch.full((10, E), torch.nan), SelectionSpec(k=1)))
    with pytest.raises(OptionError, match="that one gives none"):
        run([layer("1")], torch.randn(10, D, generator=generator), state)


def test_layers_of_a_model_hand_on_their_logits(generator):
    model = convert(pico("llama"), {i: moe_plus_plus(32, 8, N) for i in (0, 1)})
    counts = count_parameters(model)
    with record(model) as states:
        model(tokens()).logits.square().sum().backward()
    mixtures = [model.model.layers[i].mlp.mixture for i in (0, 1)]
    assert mixtures[1].router.gate.residual.weight.grad.any()
    assert [record.layer for record in states[0].tape.records] == ["0", "1"]
    # two feed-forward experts at most are active, what computes nothing is not counted beside them
    one = sum(parameter.numel() for parameter in mixtures[0].experts.forms[0].parameters()) // N
    constants = sum(parameter.numel() for parameter in mixtures[0].experts.forms[1].parameters())
    assert counts.total - counts.active == 2 * (2 * one + constants)


def test_the_balance_among_unlike_experts_by_loops(generator):
    routing = select(torch.randn(30, E, generator=generator), SelectionSpec(k=2))
    f = [n / 60 for n in r.counts(routing).tolist()]
    P = routing.logits_TE.softmax(-1).mean(0).tolist()
    for tau in (0.5, 1.0):
        expected = E * sum((1 if e < N else tau) * f[e] * P[e] for e in range(E))
        loss = heterogeneous_balance_loss(routing, zero_computation=4, tau=tau)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss, load_balancing_loss(routing))


def test_the_balance_lets_experts_without_computation_do_more(generator):
    """At its minimum over distributions that are their own load, e works by 1 / eta_e."""
    logits_E = torch.zeros(E, requires_grad=True)
    optimizer = torch.optim.SGD([logits_E], lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        p_E = logits_E.softmax(0)
        routing = select(logits_E.expand(1, E), SelectionSpec(k=1))
        heterogeneous_balance_loss(routing, load_E=p_E.detach(), zero_computation=4, tau=0.5).backward()
        optimizer.step()
    p_E = logits_E.detach().softmax(0)
    assert (p_E[N:].sum() / p_E[:N].sum()).item() == pytest.approx(2, rel=1e-3)


def test_refuses():
    with pytest.raises(OptionError, match="gate must be one of 'two-layer', 'linear', got 'mlp'"):
        layer(gate="mlp")
    with pytest.raises(OptionError, match="copy must be at least 0, got -1"):
        layer(copy=-1)
    routing = select(torch.zeros(2, 4), SelectionSpec(k=1))
    with pytest.raises(OptionError, match=r"zero_computation must lie in 0 .. 4, got 5"):
        heterogeneous_balance_loss(routing, zero_computation=5)
    with pytest.raises(OptionError, match="tau must be above 0, got 0"):
        heterogeneous_balance_loss(routing, zero_computation=1, tau=0)
