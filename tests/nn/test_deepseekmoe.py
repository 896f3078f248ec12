"""What the catalogue says of DeepSeekMoE.

T tokens, D width, F width of a feed-forward layer.
"""

import math

import pytest
import torch

from mixtura.core.errors import OptionError
from mixtura.nn import Experts, FeedForward, Mixture
from mixtura.nn.layers.deepseekmoe import deepseekmoe
from mixtura.nn.routers.topk_softmax import TopKRouter

D, F = 8, 12


@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "gelu")])
def test_segments_of_a_dense_layer_with_weight_1_are_that_layer(gated, activation, generator):
    dense, m = FeedForward(D, F, gated=gated, activation=activation), 4
    experts = Experts(m, D, F // m, gated=gated, activation=activation)
    rows = [dense.gate_proj, dense.up_proj] if gated else [dense.up_proj]
    with torch.no_grad():
        parts = [row.weight.view(m, F // m, D) for row in rows]
        getattr(experts, "gate_up_proj" if gated else "up_proj").copy_(torch.cat(parts, 1))
        experts.down_proj.copy_(dense.down_proj.weight.view(D, m, F // m).transpose(0, 1))
    hidden_TD = torch.randn(9, D, generator=generator)
    all_TK = torch.arange(m).expand(9, m)
    torch.testing.assert_close(experts(hidden_TD, all_TK, torch.ones(9, m)), dense(hidden_TD))


def parameters(layer):
    return sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("router"))


def active(layer):
    """Expert parameters that one token passes."""
    per_expert = sum(p.numel() for p in layer.experts.parameters()) // layer.experts.num_experts
    shared = 0 if layer.shared is None else sum(p.numel() for p in layer.shared.parameters())
    return layer.router.spec.k * per_expert + shared


def test_expert_parameters_and_work_do_not_depend_on_the_segments():
    layers = [deepseekmoe(D, F, 4, 2, segments=m, shared=s) for m, s in ((1, 0), (1, 1), (2, 1), (4, 0), (4, 3))]
    assert {parameters(layer) for layer in layers} == {4 * 3 * D * F}
    assert {active(layer) for layer in layers} == {2 * 3 * D * F}


def test_one_segment_and_nothing_shared_is_top_k(generator):
    torch.manual_seed(0)
    layer = deepseekmoe(D, F, 4, 2, segments=1, shared=0)
    plain = Mixture(TopKRouter(D, 4, 2, renormalize=None), Experts(4, D, F))
    plain.load_state_dict(layer.state_dict())
    hidden_TD = torch.randn(9, D, generator=generator)
    assert plain.config == layer.config
    assert torch.equal(plain(hidden_TD), layer(hidden_TD))


def test_the_shared_experts_are_a_dense_layer_of_their_width(generator):
    """With routed experts that answer 0 nothing else is left; nothing to route among is refused."""
    layer = deepseekmoe(D, F, 4, 2, segments=4, shared=3)
    torch.nn.init.zeros_(layer.experts.down_proj)
    hidden_TD = torch.randn(9, D, generator=generator)
    assert layer.shared.up_proj.weight.shape == (3 * F // 4, D)
    assert torch.equal(layer(hidden_TD), layer.shared(hidden_TD))
    with pytest.raises(OptionError, match=r"shared must lie in 0 .. segments \* k - 1 = 7, got 8"):
        deepseekmoe(D, F, 4, 2, segments=4, shared=8)


def test_routed_weights_are_softmax_over_the_routed_experts_not_renormalized(generator):
    layer = deepseekmoe(D, F, 4, 2, segments=2, shared=1)
    routing = layer.router(torch.randn(9, D, generator=generator))
    assert routing.logits_TE.shape == (9, 7)
    assert torch.equal(routing.weights_TK, routing.logits_TE.softmax(-1).topk(3).values)


@pytest.mark.parametrize(("N", "K", "m", "combinations"), [(16, 2, 1, 120), (16, 2, 4, 4426165368)])
def test_combinations(N, K, m, combinations):
    layer = deepseekmoe(D, F, N, K, segments=m, shared=0)
    assert math.comb(layer.router.num_experts, layer.router.spec.k) == combinations


def test_segments_divide_the_width():
    with pytest.raises(OptionError, match="segments must divide width 12, got 5"):
        deepseekmoe(D, F, 4, 2, segments=5)
