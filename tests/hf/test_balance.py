"""``Balancer``: terms against their formulas, splits of a step, padding, layers, warnings."""

import pytest
import torch
from torch.nn import functional as F

from mixtura.core.errors import MixturaError, MixturaWarning, OptionError, UnknownNameError
from mixtura.core.routing import Routing
from mixtura.hf import convert, mixtures, record
from mixtura.hf.balance import Balancer
from mixtura.nn import Experts, Mixture, RouterState
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.balance.router_z_loss import router_z_loss
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

TERMS = {"load-balancing": 0.5, "router-z-loss": 0.1}
LENGTHS = (9, 4, 7, 2)


def sparse_model():
    model = pico("llama")
    return convert(model, {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16)) for i in (0, 2)})


def gates(model):
    return {layer: mixture.router.gate.weight for layer, mixture in mixtures(model).items()}


def step(balancer, calls):
    """One optimizer step without the optimizer: the loss of all calls, (ids, mask) each."""
    balancer.begin_step(sum(int(mask.sum()) for _, mask in calls))
    total = 0
    for ids, mask in calls:
        with record(balancer.model) as states:
            balancer.model(ids, attention_mask=mask)
        loss, _ = balancer.loss(states)
        if balancer.terms:
            loss.backward()
        total += loss.item()
    balancer.check_tokens()
    balancer.end_step()
    return total


def padded_rows(width=9):
    ids = tokens(len(LENGTHS), width)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def splits():
    """The same four rows as one call, as two and as four; the shorter calls have less padding."""
    ids, mask = padded_rows()
    for size in (4, 2, 1):
        calls = []
        for first in range(0, 4, size):
            width = max(LENGTHS[first : first + size])
            calls.append((ids[first : first + size, :width], mask[first : first + size, :width]))
        yield calls


def test_one_call_is_the_sum_of_the_methods_over_the_layers():
    model = sparse_model()
    balancer = Balancer(model, TERMS, "micro-batch-load")
    balancer.begin_step(18)
    with record(model) as states:
        model(tokens())
    loss, parts = balancer.loss(states)
    routings = [entry.routing for entry in states[0].tape.records]
    assert len(routings) == 2
    load, z = ([f(routing) for routing in routings] for f in (load_balancing_loss, router_z_loss))
    torch.testing.assert_close(loss, 0.5 * sum(load) + 0.1 * sum(z))
    torch.testing.assert_close(parts["load-balancing"], sum(load).detach() / 2)
    torch.testing.assert_close(parts["router-z-loss"], sum(z).detach() / 2)


def test_the_previous_steps_load_gives_the_same_gradient_however_a_step_is_split():
    results = []
    for calls in splits():
        model = sparse_model()
        balancer = Balancer(model, TERMS)
        step(balancer, calls)  # fills the statistic
        model.zero_grad()
        loss = step(balancer, calls)
        results.append((loss, {layer: w.grad.clone() for layer, w in gates(model).items()}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        for layer, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][layer], rtol=0, atol=1e-6)
    assert all(gradient.abs().max() > 1e-3 for gradient in results[0][1].values())


def test_the_micro_batchs_load_does_not():
    losses = [step(Balancer(sparse_model(), {"load-balancing": 1.0}, "micro-batch-load"), calls) for calls in splits()]
    assert abs(losses[2] - losses[0]) > 1e-3


def test_the_first_step_is_one_a_layer_and_asks_nothing():
    model = sparse_model()
    loss = step(Balancer(model, {"load-balancing": 1.0}), [padded_rows()])
    assert loss == pytest.approx(2, abs=1e-6)
    assert all(w.grad.abs().max() < 1e-7 for w in gates(model).values())


def collapsed(layer, expert, T=6, E=4):
    """A state with one record, in which all tokens went to one expert."""
    logits_TE = torch.full((T, E), -9.0).index_fill(1, torch.tensor([expert]), 9.0).requires_grad_()
    state = RouterState()
    state.tape.write(layer, Routing(logits_TE, torch.ones(T, 1), torch.full((T, 1), expert)))
    return state


@pytest.mark.parametrize("statistic", ["micro-batch-load", "global-batch-lbl"])
def test_opposite_collapses_of_two_layers_cost_as_much_as_equal_ones(statistic):
    costs = []
    for experts in ((0, 0), (0, 3)):
        balancer = Balancer(pico("llama"), {"load-balancing": 1.0}, statistic)
        balancer.begin_step(6)
        states = [collapsed(str(layer), expert) for layer, expert in enumerate(experts)]
        costs.append(balancer.loss(states)[0].item())
    assert costs == pytest.approx([8, 8], rel=1e-5)


def test_padding_changes_no_bit_of_the_terms():
    """Of equal logits: what the model makes of padded rows may round otherwise."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(11, 4, generator=generator)
    results = []
    for padding in (0, 5):
        logits_TE = F.pad(real, (0, 0, 0, padding), value=torch.nan).requires_grad_()
        state = RouterState(torch.arange(11 + padding) < 11)
        router = TopKRouter(4, 4)
        router.gate = torch.nn.Identity()
        indices_TK = logits_TE.nan_to_num().topk(2).indices
        state.tape.write("0", Routing(logits_TE, torch.full((11 + padding, 2), 0.5), indices_TK))
        balancer = Balancer(pico("llama"), TERMS, "micro-batch-load")
        balancer.begin_step(11)
        loss = balancer.loss([state])[0]
        loss.backward()
        results.append((loss.detach(), logits_TE.grad[:11]))
        assert not logits_TE.grad[11:].any()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_calls_without_gradient_are_not_counted():
    model = sparse_model()
    balancer = Balancer(model, TERMS)
    balancer.begin_step(18)
    with record(model) as states:
        model(tokens())
        with torch.no_grad():
            model(tokens(seed=1))
    balancer.loss(states)
    balancer.check_tokens()
    assert balancer.routed == {"0": 18, "2": 18}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_calls_before_a_backward_are_counted_once_each(checkpointing):
    """As of chosen and rejected answers; recomputation counts nothing again."""
    model = sparse_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    balancer = Balancer(model, TERMS, "micro-batch-load")
    balancer.begin_step(36)
    with record(model) as states:
        outputs = [model(tokens(seed=seed), use_cache=False).logits for seed in (1, 2)]
    loss, _ = balancer.loss(states)
    (loss + 0 * sum(o.sum() for o in outputs)).backward()
    balancer.check_tokens()
    assert sum(int(c.sum()) for c in balancer.counts.values()) == 36 * 2 * 2
    torch.testing.assert_close(gates(model)["2"].grad, expected_of_two_calls(), rtol=0, atol=1e-6)


def expected_of_two_calls():
    model = sparse_model().train()
    total = 0
    for seed in (1, 2):
        with record(model) as states:
            model(tokens(seed=seed), use_cache=False)
        for entry in states[0].tape.records:
            total = total + (0.5 * load_balancing_loss(entry.routing) + 0.1 * router_z_loss(entry.routing)) / 2
    total.backward()
    return gates(model)["2"].grad


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_native_mixtures_are_balanced_too(family):
    model = pico(family)
    balancer = Balancer(model, {"load-balancing": 1.0})
    for _ in range(2):
        model.zero_grad()
        step(balancer, [padded_rows()])
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("make", [sparse_model, lambda: pico("olmoe")], ids=["own", "native"])
def test_a_term_without_gradient_path_is_named_once(make):
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate" not in name or ".0." in name)
    balancer = Balancer(model, TERMS)
    balancer.begin_step(18)
    with record(model) as states:
        model(tokens())
    said = r"'router-z-loss'\] have no gradient path to the routers of layers (1, )?2:"
    with pytest.warns(MixturaWarning, match=said):
        balancer.loss(states)
    balancer.loss(states)


def test_tokens_that_were_announced_wrongly_are_refused():
    balancer = Balancer(sparse_model(), TERMS)
    balancer.begin_step(17)
    with record(balancer.model) as states:
        balancer.model(tokens())
    balancer.loss(states)
    with pytest.raises(MixturaError, match="announced with 17 tokens, but layer 0 routed 18"):
        balancer.check_tokens()


def test_bad_terms_are_refused_by_name():
    model = sparse_model()
    with pytest.raises(UnknownNameError, match="did you mean 'load-balancing'"):
        Balancer(model, {"load-balancin": 1.0})
    with pytest.raises(UnknownNameError, match="unknown method of role balance 'topk-softmax'"):
        Balancer(model, {"topk-softmax": 1.0})
    with pytest.raises(UnknownNameError, match="did you mean 'global-batch-lbl'"):
        Balancer(model, {}, "global-batch")
    with pytest.raises(OptionError, match=r"term 'load-balancing' needs a number, or a mapping with 'coefficient'"):
        Balancer(model, {"load-balancing": {"score": "sigmoid"}})
    with pytest.raises(OptionError, match="did you mean 'score'"):
        Balancer(model, {"load-balancing": {"coefficient": 1, "scores": "sigmoid"}})
    with pytest.raises(OptionError, match="begin_step must be called before loss"):
        Balancer(model, TERMS).loss([])


def test_a_model_without_mixtures_has_nothing_to_balance():
    model = pico("llama")
    balancer = Balancer(model, TERMS)
    balancer.begin_step(18)
    with record(model) as states:
        model(tokens())
    with pytest.raises(OptionError, match="need a routing with gradient, but none was made"):
        balancer.loss(states)
    nothing = Balancer(model, {})
    nothing.begin_step(18)
    assert nothing.loss(states) == (torch.zeros(()), {})
    nothing.end_step()


def test_options_of_a_term_reach_its_method():
    model = sparse_model()
    balancer = Balancer(model, {"load-balancing": {"coefficient": 2.0, "score": "sigmoid"}}, "micro-batch-load")
    balancer.begin_step(18)
    with record(model) as states:
        model(tokens())
    expected = sum(load_balancing_loss(r.routing, score="sigmoid") for r in states[0].tape.records)
    torch.testing.assert_close(balancer.loss(states)[0], 2 * expected)


def test_routers_hear_of_each_step_once(monkeypatch):
    heard = []
    monkeypatch.setattr(TopKRouter, "end_step", lambda self, counts_E: heard.append(counts_E))
    step(Balancer(sparse_model(), {}), list(splits())[2])
    assert [int(counts_E.sum()) for counts_E in heard] == [sum(LENGTHS) * 2] * 2


def test_state_goes_through_json():
    import json

    model = sparse_model()
    one, other = Balancer(model, TERMS), Balancer(model, TERMS)
    step(one, [padded_rows()])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    model.zero_grad()
    assert step(one, [padded_rows()]) == step(other, [padded_rows()])
