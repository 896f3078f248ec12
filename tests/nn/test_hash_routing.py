"""What the catalogue says of hash routing.

T tokens, D width, V entries of the vocabulary, E experts.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core import routing as r
from mixtura.core.errors import OptionError, ShapeError
from mixtura.hf import convert
from mixtura.nn import Experts, FeedForward, Mixture, RouterState
from mixtura.nn.backends import sorted_backend
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.routers.hash_routing import HashRouter, balanced_table
from mixtura.nn.state import use_state
from mixtura.traces.metrics import mutual_information
from pico import pico, tokens

D, V, E = 8, 40, 4


def route(module, hidden_TD, token_T):
    with use_state(RouterState(token_T=token_T)):
        return module(hidden_TD)


def drawn(generator, T=30):
    return torch.randn(T, D, generator=generator), torch.randint(V, (T,), generator=generator)


def test_neither_context_nor_training_change_the_routing(generator):
    router = HashRouter(D, E, V)
    hidden_TD, token_T = drawn(generator)
    routing, other = route(router, hidden_TD, token_T), route(router.train(), hidden_TD.flip(0), token_T)
    assert torch.equal(routing.indices_TK[:, 0], router.table[token_T, 0])
    assert torch.equal(other.indices_TK, routing.indices_TK)
    assert (routing.weights_TK == 1).all()
    assert torch.equal(routing.logits_TE, r.dense(routing))


def test_a_permutation_of_the_sequence_permutes_the_output(generator):
    layer = Mixture(HashRouter(D, E, V), Experts(E, D, 6))
    hidden_TD, token_T = drawn(generator)
    order_T = torch.randperm(30, generator=generator)
    out_TD = route(layer, hidden_TD, token_T)
    torch.testing.assert_close(route(layer, hidden_TD[order_T], token_T[order_T]), out_TD[order_T])


def segments(experts, *numbers):
    """A dense layer put together from the hidden units of some experts."""
    views = [view_expert(experts, e) for e in numbers]
    dense = FeedForward(experts.dim, experts.width * len(numbers))
    with torch.no_grad():
        dense.gate_proj.weight.copy_(torch.cat([view.gate_FD for view in views]))
        dense.up_proj.weight.copy_(torch.cat([view.up_FD for view in views]))
        dense.down_proj.weight.copy_(torch.cat([view.down_DF for view in views], 1))
    return dense


def test_one_expert_is_the_dense_layer_to_the_bit(generator):
    layer = Mixture(HashRouter(D, 1, V), Experts(1, D, 6, gated=False, activation="gelu"))
    layer.experts.backend = sorted_backend  # torch's own products, as the dense layer has them
    dense = FeedForward(D, 6, gated=False, activation="gelu")
    with torch.no_grad():
        dense.up_proj.weight.copy_(layer.experts.up_proj[0])
        dense.down_proj.weight.copy_(layer.experts.down_proj[0])
    hidden_TD, token_T = drawn(generator)
    assert torch.equal(route(layer, hidden_TD, token_T), dense(hidden_TD))


def test_multi_hash_puts_hidden_layers_together(generator):
    """Each token has one segment of each group, and computes what a dense layer of both segments does."""
    layer = Mixture(HashRouter(D, 6, V, hashes=2), Experts(6, D, 5))
    hidden_TD, token_T = drawn(generator)
    out_TD = route(layer, hidden_TD, token_T)
    for t, (first, second) in enumerate(layer.router.table[token_T].tolist()):
        assert first in (0, 1, 2)
        assert second in (3, 4, 5)
        torch.testing.assert_close(out_TD[t], segments(layer.experts, first, second)(hidden_TD[t]))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 6))
def test_a_balanced_table_is_off_by_the_largest_frequency_at_most(frequencies, num_experts):
    expert_V = balanced_table(frequencies, num_experts)
    load_E = np.bincount(expert_V, weights=frequencies, minlength=num_experts)
    assert load_E.max() - load_E.min() <= max(frequencies)
    assert abs(load_E - load_E.mean()).max() <= max(frequencies)


def test_a_balanced_table_by_loops():
    frequencies = [3.0, 9.0, 1.0, 1.0, 5.0, 8.0, 2.0]
    loads, expert_V = [0.0, 0.0, 0.0], [0] * 7
    for token in (1, 5, 4, 0, 6, 2, 3):
        expert_V[token] = loads.index(min(loads))
        loads[expert_V[token]] += frequencies[token]
    assert balanced_table(frequencies, 3) == expert_V
    assert sorted(loads) == [9, 10, 10]


def test_tokens_that_never_occur_are_shared_out_too():
    assert np.bincount(balanced_table([0.0] * 12, 4)).tolist() == [3, 3, 3, 3]


def test_a_balanced_router_has_that_table():
    frequencies = [float(V - v) for v in range(V)]
    router = HashRouter(D, E, V, table="balanced", frequencies=frequencies)
    assert router.table[:, 0].tolist() == balanced_table(frequencies, E)


def test_a_seed_gives_one_table_and_seeds_differ():
    tables = [HashRouter(D, E, V, seed=seed).table for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert tables[0].unique().tolist() == [0, 1, 2, 3]


def test_experts_know_all_of_themselves_from_the_token(generator):
    """The mutual information of expert and token id is the entropy of the expert, its upper bound."""
    hidden_TD, token_T = drawn(generator, T=500)
    expert_T = route(HashRouter(D, E, V), hidden_TD, token_T).indices_TK[:, 0]
    joint_VE = np.zeros((V, E))
    np.add.at(joint_VE, (token_T.numpy(), expert_T.numpy()), 1)
    share_E = joint_VE.sum(0) / 500
    assert mutual_information(joint_VE) == pytest.approx(r.entropy(share_E))


def test_the_same_token_goes_to_the_same_expert_in_a_model():
    model = convert(pico("llama"), {1: Mixture(HashRouter(32, 4, 64), Experts(4, 32, 16))})
    x = tokens()
    with torch.no_grad():
        once = model(x).logits
        again = model(x.flip(0)).logits.flip(0)
    torch.testing.assert_close(once, again)
    with pytest.raises(OptionError, match=r"chooses by token ids, but this call has none: .* give that input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(x))


def test_refuses_calls_without_fitting_ids():
    router, hidden_TD = HashRouter(D, E, V), torch.zeros(3, D)
    with pytest.raises(OptionError, match="run the router inside of its model"):
        router(hidden_TD)
    with pytest.raises(ShapeError, match=r"token_T must have shape \(3,\), got \(4,\)"):
        route(router, hidden_TD, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(OptionError, match="token ids must be below vocabulary 40, got 40"):
        route(router, hidden_TD, torch.tensor([0, 40, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "clusters"}, "table must be one of 'random', 'balanced', got 'clusters'"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"hashes": 3}, "hashes must divide the number of experts 4, got 3"),
        ({"table": "balanced"}, "table 'balanced' needs frequencies"),
        ({"frequencies": [1.0] * V}, "table 'random' takes no frequencies"),
        ({"table": "balanced", "frequencies": [1.0] * V, "hashes": 2}, "needs frequencies and one hash"),
        ({"table": "balanced", "frequencies": [1.0, 2.0]}, "frequencies must be 40 finite numbers .* got 2"),
        ({"table": "balanced", "frequencies": [-1.0] * V}, "at least 0, got 40, the least -1.0"),
    ],
    ids=lambda part: part.split(",")[0][:30] if isinstance(part, str) else "-".join(part),
)
def test_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        HashRouter(**{"dim": D, "num_experts": E, "vocabulary": V, **options})
