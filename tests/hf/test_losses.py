"""Losses from the tape: against formulas, padding, gradient."""

import pytest
import torch
from torch.nn import functional as F

from mixtura.core.errors import OptionError, UnknownNameError
from mixtura.hf import convert, mixtures, record
from mixtura.hf.losses import IGNORED, balance_loss, next_token_loss
from mixtura.nn import Experts, Mixture
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.balance.router_z_loss import router_z_loss
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

TERMS = {"load-balancing": 0.5, "router-z-loss": 0.1}


def sparse_model():
    model = pico("llama")
    return convert(model, {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16)) for i in (0, 2)})


def test_next_token_loss_is_the_mean_over_the_predicted_tokens():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 3:] = IGNORED
    expected = [
        -logits[b, q].log_softmax(-1)[labels[b, q + 1]] for b in range(2) for q in range(4) if labels[b, q + 1] >= 0
    ]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(expected).mean())


def test_next_token_loss_of_micro_batches_is_that_of_the_batch():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:] = IGNORED
    count = labels[:, 1:].ne(IGNORED).sum()
    parts = [next_token_loss(logits[i : i + 1], labels[i : i + 1], count) for i in range(3)]
    torch.testing.assert_close(sum(parts), next_token_loss(logits, labels))


def test_next_token_loss_of_nothing_is_zero():
    assert next_token_loss(torch.randn(1, 4, 7), torch.full((1, 4), IGNORED)) == 0


def test_next_token_loss_is_computed_in_float32():
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits.float()[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert torch.equal(next_token_loss(logits, labels), expected)


def test_balance_is_summed_over_layers_and_equals_the_methods():
    model = sparse_model()
    with record(model) as states:
        model(tokens())
    loss, parts = balance_loss(states, TERMS)
    routings = [entry.routing for entry in states[0].tape.records]
    assert len(routings) == 2
    load, z = ([f(routing) for routing in routings] for f in (load_balancing_loss, router_z_loss))
    torch.testing.assert_close(loss, 0.5 * sum(load) + 0.1 * sum(z))
    torch.testing.assert_close(parts["load-balancing"], sum(load).detach() / 2)
    torch.testing.assert_close(parts["router-z-loss"], sum(z).detach() / 2)


def test_balance_of_two_calls_is_the_mean_of_the_calls():
    model = sparse_model()
    with record(model) as states:
        model(tokens(seed=1))
        model(tokens(seed=2))
    each = [balance_loss([state], TERMS)[0] for state in states]
    torch.testing.assert_close(balance_loss(states, TERMS)[0], sum(each) / 2)


def test_gradient_reaches_every_router_and_no_expert():
    model = sparse_model()
    with record(model) as states:
        model(tokens())
    balance_loss(states, TERMS)[0].backward()
    for mixture in mixtures(model).values():
        assert mixture.router.gate.weight.grad.abs().sum() > 0
        assert mixture.layer != "2" or mixture.experts.down_proj.grad is None  # nothing comes after the last router


def test_padding_changes_neither_loss_nor_gradient():
    ids, gradients, losses = tokens(2, 6), [], []
    for padding in (0, 4):
        model = sparse_model()
        mask = F.pad(torch.ones_like(ids), (0, padding))
        with record(model) as states:
            model(F.pad(ids, (0, padding)), attention_mask=mask)
        loss, _ = balance_loss(states, TERMS)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(mixtures(model)["2"].router.gate.weight.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_no_terms_no_loss():
    model = pico("llama")
    with record(model) as states:
        model(tokens())
    assert balance_loss(states, {}) == (torch.zeros(()), {})


def test_terms_need_mixtures_and_known_names():
    with pytest.raises(OptionError, match="need a model with mixtures"):
        balance_loss([], {"load-balancing": 1.0})
    with pytest.raises(UnknownNameError, match="did you mean 'load-balancing'"):
        balance_loss([], {"load-balancin": 1.0})
    with pytest.raises(UnknownNameError, match="unknown method of balance 'topk-softmax'"):
        balance_loss([], {"topk-softmax": 1.0})
